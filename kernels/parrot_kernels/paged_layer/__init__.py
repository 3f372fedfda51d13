"""Contract of `paged_layer`: a decoder layer for the rows of a step over a paged cache, in one call.

    q, k, v = few_rows_linear(hidden, w_qkv, norm_1, b_qkv), heads of q and k normed where there are norms, and turned
    k and v go to their places in the cache
    attended = few_rows_linear(paged_attention(q, cache), w_out, residual=hidden)
    out      = few_rows_linear(few_rows_linear(attended, w_gate_up, norm_2), w_down, residual=attended, gated)

A step of answers has few rows: on a CPU the host needs longer for the calls of a layer than for its products.

Shapes: T rows of S requests, H hidden size, g key heads of even width d with r query heads each, I columns of gate and
of up, B blocks of N rows, W blocks of the longest table.
    hidden                    [T, H], float32 or bfloat16; all floats have its dtype, all tensors are contiguous
    norm_1, norm_2            [H], of RMS norms
    w_qkv, b_qkv              [g (r + 2) d, H] (of each key head its queries, its key, its value), [g (r + 2) d] or None
    q_norm, k_norm            [d], of RMS norms of each head, or None
    cos, sin                  [T, 1, 1, 1, d / 2], [T, 1, 1, 2, d / 2]: first half out = first cos + second sin[0],
                              second half out = second cos + first sin[1]
    key_cache, value_cache    [B, g, N, d], written to
    blocks, offsets           [T] int64: where the key and value of each row go; no place twice
    block_tables, cu_seqlens_q, kv_lengths    of `paged_attention`
    w_out                     [H, g r d]
    w_gate_up, w_down         [2 I, H], [H, I]
    eps, scale                of the norms, of the scores
    out                       [T, H]

Rules every back end keeps: those of `few_rows_linear` and `paged_attention`; norms of heads and turns in float32, with
one rounding; a row's result does not depend on the other requests; no gradients.

Launchers:
    paged_layer(hidden, norm_1, w_qkv, b_qkv, q_norm, k_norm, cos, sin, key_cache, value_cache, blocks, offsets,
                block_tables, cu_seqlens_q, kv_lengths, w_out, norm_2, w_gate_up, w_down, eps, scale) -> out
    why_not(*args)
"""
