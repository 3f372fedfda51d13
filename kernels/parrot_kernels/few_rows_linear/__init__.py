"""Contract of `few_rows_linear`: a linear layer on a few rows, with what comes right before and after it.

    out = f(x) @ weight.T + bias + residual

f is one of: nothing; the RMS norm x / sqrt(mean(x^2) + eps) * norm; silu(gate) * up of the halves of x. A step of
answers has one row of each, and its time is that of the calls around its products.

Shapes: M rows, K inputs, N outputs.
    x         [M, K], or [M, 2 K] where `gated` (gate first), float, contiguous
    weight    [N, K], dtype of x, contiguous
    norm      [K], dtype of x, or None; not with `gated`
    bias      [N], dtype of x, or None
    residual  [M, N], dtype of x, contiguous, or None
    gated     whether x holds gate and up
    eps       of the norm
    out       [M, N], dtype of x

Rules every back end keeps: arithmetic in float32 (float64 for float64 x), also between f and the product, and one
rounding at the end; M = 0 is valid; no gradients: it is for inference. The C++ loops also give a row the same sums
whatever rows are beside it; the reference need not.

Launchers:
    few_rows_linear(x, weight, norm, bias, residual, gated, eps) -> out
    why_not(*args)
"""
