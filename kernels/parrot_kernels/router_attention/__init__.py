"""Contract of `router_attention`: causal attention over packed samples, and the same attention over two more columns.

For head h and query row i of a sample, with w[h, i, j] the attention weights over the key rows j of that sample:
    out[i, h]   = sum over j of w[h, i, j] * value[j, h // (n / g)]
    extra[h, i] = sum over j of w[h, i, j] * columns[position of j]
    lse[h, i]   = log-sum-exp over the seen j of scale * query[i, h] . key[j, h // (n / g)]
The router of Wings (arXiv 2406.03496) is the sum of `extra` over the heads, plus a bias: attention weights summed over
heads, times a matrix with one pair of numbers for each position. So it needs no matrix of attention weights.

Shapes: T query rows, M key rows, S samples, n query heads, g key/value heads (n a multiple of g), d head width,
P positions.
    query         [T, n, d], float; the last dimension contiguous
    key, value    [M, g, d], dtype of query; the last dimension contiguous
    columns       [P, 2], float: what a key at each position of its sample adds to `extra`
    cu_seqlens_q  [S + 1], int32, leading 0: query rows of each sample; the last is T
    cu_seqlens_kv [S + 1], int32: its key rows; the last is M
    positions     [S, 2], int32, or None: position in its sequence of the first query row and of the first key row of
                  each sample. None: the last query row has the position of the last key row and the keys start at 0,
                  as in training and with a key/value cache. Slices of a sequence (context parallelism) name theirs.
    max_seqlen_q, max_seqlen_kv  the longest sample, or more
    scale         positive factor of the scores
    out           [T, n, d], dtype of query
    extra         [n, T, 2], lse [n, T]: float32 (float64 for float64 inputs)

Rules every back end keeps:
    * scores and sums in float32 (float64 for float64 inputs) whatever the input dtype;
    * a row sees the keys of its sample whose position is not after its own; one that sees none has out = 0, extra = 0,
      lse = -inf and no gradients;
    * a key whose position is not in [0, P) adds nothing to `extra`;
    * T = 0, M = 0 and empty samples are valid; memory is linear in T + M (but not in the reference);
    * gradients are deterministic: no atomics; those not needed are neither computed nor allocated (an empty [0] tensor
      stands for them).
`extra` stays apart by head because parts of a sequence are combined head by head (weights exp(lse - total lse)).

Launchers:
    router_attention_fwd(query, key, value, columns, cu_seqlens_q, cu_seqlens_kv, positions, max_seqlen_q,
                         max_seqlen_kv, scale) -> (out, extra, lse)
    router_attention_bwd(grad_out, grad_extra, grad_lse, query, key, value, columns, cu_seqlens_q, cu_seqlens_kv,
                         positions, out, extra, lse, max_seqlen_q, max_seqlen_kv, scale, needs)
        -> (grad_query, grad_key, grad_value, grad_columns)
        grad_extra and grad_lse may be None; grad_extra may be expanded over heads; needs = (query, key, value,
        columns) bools.
    why_not(*args)
"""
