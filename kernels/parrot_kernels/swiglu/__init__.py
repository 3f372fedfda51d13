"""Contract of `swiglu`: silu(gate) * up, times one weight a segment.

    h[j, v] = weights[j] * silu(z[j, v, 0]) * z[j, v, 1]

Shapes: J segments (tokens with V = 1, images), V rows a segment, I inner width.
    z        [J, V, 2, I], float, contiguous; [:, :, 0] gate, [:, :, 1] up
    weights  [J], float32 (float64 for float64 z), or None for ones
    h        [J, V, I], dtype of z

Rules every back end keeps: arithmetic in float32 (float64 for float64 z), one rounding at the end; the gradient of a
weight is the sum of grad_h * silu(gate) * up over its segment, from values before the weight (never by dividing by it);
deterministic; J = 0 is valid; every I >= 1.

Launchers:
    swiglu_fwd(z, weights) -> h
    swiglu_bwd(grad, z, weights) -> (grad_z, grad_weights); grad_weights is an empty [0] without weights
    why_not(*args)
"""
