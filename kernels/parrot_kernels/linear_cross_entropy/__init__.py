"""Contract of `linear_cross_entropy`: the LM head and its cross entropy without the [L, vocabulary] logits.

    logits[l, v]     = hidden[l] . weight[v]
    lse[l]           = log of the sum over v of exp(logits[l, v])
    target_logits[l] = logits[l, targets[l] - vocab_start], 0 when that row of the vocabulary is not in `weight`
The loss is lse - target_logits. The two come apart so that ranks that each hold a slice of the vocabulary can combine
them (log-sum-exp of the lse, sum of the target logits).

Shapes: L label rows, H hidden_size, N rows of the vocabulary held here.
    hidden         [L, H], float
    weight         [N, H], dtype of hidden
    targets        [L], int64, global ids
    vocab_start    global id of weight[0]
    lse, target_logits  [L], float32 (float64 for float64 inputs)

Logits are formed in blocks of columns, all rows at once: every row of `weight` is read once in each pass and every row
of its gradient is written once. (Blocks of rows would read and write all of the weight's gradient for each block.) The
backward pass forms each block again from hidden and lse: the weight's gradient cannot be had in the forward pass, where
the gradients of the losses are not known yet. One block of logits, or of their gradients, exists at a time.

Rules every back end keeps: logits and sums in float32 (float64); L = 0 is valid; deterministic; gradients that are not
needed are neither computed nor allocated (an empty [0] tensor stands for them).

Launchers:
    linear_cross_entropy_fwd(hidden, weight, targets, vocab_start) -> (lse, target_logits)
    linear_cross_entropy_bwd(grad_lse, grad_target_logits, hidden, weight, targets, lse, vocab_start, needs)
        -> (grad_hidden, grad_weight); needs = (hidden, weight) bools
    why_not(*args)
"""
