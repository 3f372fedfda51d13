"""Contract of `expert_mlp`: SwiGLU experts under image-level routing, summed with the route's weights.

    FFN_e(x) = (silu(x @ gate_e.T) * (x @ up_e.T)) @ down_e
    y[i, v]  = residual_scale * x[i, v] + output_scale * sum over e of probs[i, e] * FFN_e(x[i, v])
A route belongs to an image: its V rows share one row of `probs`. (Parrot, arXiv 2406.02539, eq. 4 and 5; V = 1 is
token-level routing.)

Shapes: n images, V rows an image, H hidden_size, E experts, I ffn_hidden_size, K topk.
    x              [n, V, H], float, contiguous
    w_gate_up      [E, 2, I, H], dtype of x; [:, 0] gate, [:, 1] up
    w_down         [E, I, H], dtype of x: row i is what inner unit i writes, so that all experts together are one
                   [E * I, H] matrix and one expert is a slice
    probs          [n, E], float32 (float64 for float64 x)
    topk_indices   [n, K], expert_offsets [E + 1], plan [J]: as `topk_routing` returns them, or fewer pairs: a plan of
                   J <= n * K positions runs only these (an image may have no expert here, or fewer than K); slots that
                   it lacks may name any expert

Two forms. Dense runs every expert, all together one fat SwiGLU MLP: up-projection [n*V, H] x [H, E*2*I], the weight
multiplied in its SwiGLU epilogue, a down-projection that sums over experts by its inner dimension E*I and adds the
residual. Top-k computes only the chosen (image, expert) segments, sorted by expert.

Saved for the backward pass: x and `z` only, the pre-activations of the up-projection, in the dtype of x:
    dense  z [E, n, V, 2, I]
    topk   z [J, V, 2, I], segment j belongs to position plan[j]
With save_z false z is an empty [0] tensor, and a backward pass that gets such a z computes it again from x.
Nothing E-fold and H-wide is ever formed: with h the UNWEIGHTED silu(g) * u and dh' = output_scale * dy @ down.T taken
BEFORE the weight, d probs[i, e] is the sum of h * dh' over the rows of image i and the columns of expert e.

Rules every back end keeps: accumulation in float32 (float64 for float64 x) inside each matrix product; every I >= 1
(no alignment); n = 0 and experts that nobody chose are valid (zero gradients); deterministic; gradients that are not
needed are not returned (an empty [0] tensor stands for them) and cost no matrix product. In the top-k form grad_probs
is zero at experts that were not chosen.

Launchers (Scales = (residual_scale, output_scale); needs = (x, w_gate_up, w_down, probs) bools):
    expert_mlp_dense_fwd(x, w_gate_up, w_down, probs, scales, save_z) -> (y, z)
    expert_mlp_dense_bwd(grad, x, w_gate_up, w_down, probs, z, scales, needs)
        -> (grad_x, grad_w_gate_up, grad_w_down, grad_probs)
    expert_mlp_topk_fwd(x, w_gate_up, w_down, probs, topk_indices, expert_offsets, plan, scales, save_z) -> (y, z)
    expert_mlp_topk_bwd(grad, x, w_gate_up, w_down, probs, topk_indices, expert_offsets, plan, z, scales, needs)
        -> (grad_x, grad_w_gate_up, grad_w_down, grad_probs)
    why_not(*args)
"""
