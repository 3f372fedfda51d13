"""Contract of `paged_attention`: rows of requests attend to the keys and values that a paged cache holds of them.

A cache is blocks of N rows; the block table of a request names its blocks in order. Query row i of a request with L of
them has position p = kv_length - L + i (its own key is in the cache already) and sees the positions up to its own:
    out[t, h]   = sum over j <= p of w[t, h, j] * value of position j, with w = softmax(scale * query[t, h] . key of j)
    extra[h, t] = sum over j <= p of w[t, h, j] * columns[j]
(head h of the query reads key/value head h // (n / g)). L is 1 where answers go on and more where a prompt is read in
pieces; both may be in one call. The r = n / g query heads that share a key head are rows of one product with it.

Shapes: T query rows, S requests, n query heads, g key/value heads (n a multiple of g), d head width, B blocks of N
rows, W blocks of the longest table, P positions.
    query         [T, n, d], float; the last dimension contiguous
    key_cache     [B, g, N, d], dtype of query, contiguous
    value_cache   [B, g, N, d], dtype of query, contiguous
    block_tables  [S, W], int32: position j of a request is row j % N of block block_tables[s, j // N]; entries after
                  its last block are not looked at
    cu_seqlens_q  [S + 1], int32, leading 0: query rows of each request; the last is T
    kv_lengths    [S], int32: positions of each request, its query rows included
    columns       [P, 2], float, or None: what each position adds to `extra`
    visible       [B, N], bool, or None: rows of the cache that may be seen; None: all of them
    max_seqlen_q  the most query rows of a request, or more
    scale         positive factor of the scores
    out           [T, n, d], dtype of query
    extra         [n, T, 2], float32 (float64 for float64 inputs); [0] without columns

Rules every back end keeps:
    * scores and sums in float32 (float64 for float64 inputs) whatever the input dtype;
    * a row that sees nothing has out = 0 and extra = 0;
    * a position that is not in [0, P) adds nothing to `extra`;
    * T = 0, S = 0 and requests without a query row are valid;
    * a row's result does not depend on the other requests, nor on which blocks hold its request;
    * no gradients: it is for inference.

Launchers:
    paged_attention(query, key_cache, value_cache, block_tables, cu_seqlens_q, kv_lengths, columns, visible,
                    max_seqlen_q, scale) -> (out, extra)
    why_not(*args)
"""
