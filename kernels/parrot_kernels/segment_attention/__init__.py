"""Contract of `segment_attention`: each query row attends to one contiguous segment of key rows, without a dense mask.

    out[t, h] = sum over j in [kv_start[t], kv_end[t]) of softmax(scale * query[t, h] . key[j]) * value[j]
    lse[h, t] = log-sum-exp over the same j of scale * query[t, h] . key[j]
(head h of the query reads key/value head h // (n / g)). This is cross-attention of packed text rows to the tokens of
one image each (the immediate-media rule of Flamingo, arXiv 2204.14198), to the memory of their sample (LoRRA), or to
those rows of a memory that are not after them (kv_end then grows from row to row).

Shapes: T query rows, M key rows, n query heads, g key/value heads (n a multiple of g), d head width.
    query             [T, n, d], float; the last dimension contiguous
    key, value        [M, g, d], dtype of query; the last dimension contiguous
    kv_start, kv_end  [T], int32: the segment of each row; 0 <= start, end <= M where it is not empty
    scale             positive factor of the scores
    out               [T, n, d], dtype of query
    lse               [n, T], float32 (float64 for float64 inputs)

Rules every back end keeps:
    * scores and sums in float32 (float64 for float64 inputs) whatever the input dtype;
    * an empty segment (end <= start) has out = 0, lse = -inf and no gradients;
    * any segments are right; work is least when neighbouring rows share one or have segments close to each other;
    * T = 0 and M = 0 are valid; memory is linear in T + M (but not in the reference);
    * gradients are deterministic: no atomics; those not needed are neither computed nor allocated (an empty [0] tensor
      stands for them).

Launchers:
    segment_attention_fwd(query, key, value, kv_start, kv_end, scale) -> (out, lse)
    segment_attention_bwd(grad_out, grad_lse, query, key, value, kv_start, kv_end, out, lse, scale, needs)
        -> (grad_query, grad_key, grad_value); grad_lse may be None; needs = (query, key, value) bools
    why_not(*args)
"""
