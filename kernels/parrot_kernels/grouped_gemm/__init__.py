"""Contract of `grouped_gemm`: one matrix product for each group of a ragged batch, groups given by offsets.

    m_grouped_gemm    y[r] = a[r] @ w_g                       for the rows r of each group g (M varies; forward, dgrad)
    m_grouped_swiglu  h[r] = weights * silu(a[r] @ gate_g.T) * (a[r] @ up_g.T)
    k_grouped_gemm    c_g  = sum over the rows r of group g of outer(a[r], b[r])       (K varies; weight gradient)
where a (for k_grouped_gemm b) is `x` in place, or `x` gathered while it is loaded.

Rows come in segments of V rows each: an image (V = 577, say) or a token (V = 1). Groups are runs of whole segments.
    G groups, J segments, V rows a segment, S segments of x before the gather, N and K widths, I inner width.
    x          [J, V, K] in place (plan None), or [S, V, K] gathered
    offsets    [G + 1], int32 or int64, on the device: group g holds the segments offsets[g] to offsets[g + 1];
               rises from 0 to at most J. Rows past offsets[G] are padding: they come out as zeros and go in nowhere.
    plan       [J] int64 or None. Segment j reads x[plan[j] // topk], so that the plan of `topk_routing` can be given as
               it is, and with topk = 1 any index. Its entries differ from one another and lie in [0, S * topk).
    w          m_grouped_gemm: [G, N, K] when trans_w (rows of w are columns of the product, as in torch.nn.Linear),
               else [G, K, N]
    w_gate_up  [G, 2, I, K]; [:, 0] gate, [:, 1] up
    weights    [J] float32 (float64 for float64 x) or None: factor of each segment's h
    y          [J, V, N];  h [J, V, I];  z [J, V, 2, I], the pre-activations, or an empty [0] without save_z
    c          [G, N, K] of a [J, V, N] (always in place) and b [J, V, K] or, gathered, [S, V, K]
Floats have the dtype of x except `weights`; all tensors are contiguous.

Rules every back end keeps: accumulation in float32 (float64 for float64 x) inside each product; the SwiGLU and the
weight are applied to the accumulator before it is rounded; every width >= 1 (no alignment); J = 0, empty groups (zero
c) and padding are valid; deterministic; no value of `offsets` or `plan` is read on the host where tensors are on a
device, so that launches can be captured in a CUDA graph.

Launchers (needs = (x, w) bools; a gradient that is not needed is an empty [0]):
    m_grouped_gemm(x, w, offsets, plan, topk, trans_w) -> y
    m_grouped_gemm_bwd(grad, x, w, offsets, plan, topk, trans_w, needs) -> (grad_x, grad_w)
    m_grouped_swiglu(x, w_gate_up, offsets, plan, topk, weights, save_z) -> (h, z)
    m_grouped_swiglu_bwd(grad, x, w_gate_up, offsets, plan, topk, weights, z, needs)
        -> (grad_x, grad_w_gate_up, grad_weights); an empty z is computed again; grad_weights is [0] without weights
    k_grouped_gemm(a, b, offsets, plan, topk) -> c
    why_not(*args)
"""
