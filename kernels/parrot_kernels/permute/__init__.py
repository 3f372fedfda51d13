"""Contract of `permute` and `unpermute`: rows into the order of a dispatch plan, and back with their weighted sum.

    permute    rows[j] = x[plan[j] // topk]            row_probs[j] = probs at position plan[j]
    unpermute  y[t]    = sum over k of probs[t, k] * rows[position of (t, k) in the plan]
The plan is that of `topk_routing`: `plan[j] = t * topk + k` says that place j holds row t for its choice k.

Shapes: T rows (tokens, or images flattened to V * H columns), K topk, R = len(plan) <= T * K, W columns.
    x, y       [T, W], float
    rows       [R, W], dtype of x
    probs      [T, K], float32 (float64 for float64 x), or None: no row_probs (an empty [0]), and a plain sum
    row_probs  [R], dtype of probs
    plan       [R] int64, entries differ from one another and lie in [0, T * K). A position that no entry names was
               dropped: it contributes nothing and gets zero gradients.
All tensors are contiguous.

Rules every back end keeps: sums in float32 (float64 for float64 x), over k = 0, 1, ... in this order; no atomics;
R = 0, T = 0 and W = 0 are valid; no value of `plan` is read on the host where tensors are on a device.

Launchers (num_rows is T; needs = (rows, probs) bools):
    permute_fwd(x, probs, plan, topk) -> (rows, row_probs)
    permute_bwd(grad_rows, grad_row_probs, plan, topk, num_rows) -> (grad_x, grad_probs); for a gradient that is None an
        empty float32 [0]
    unpermute_fwd(rows, probs, plan, topk, num_rows) -> y
    unpermute_bwd(grad, rows, probs, plan, topk, needs) -> (grad_rows, grad_probs); empty [0] where not needed, and
        grad_probs without probs
    why_not(*args)
"""
