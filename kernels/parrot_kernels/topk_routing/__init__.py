"""Contract of `topk_routing`: softmax scores, the K best experts of each row, their weights and the dispatch plan.

Shapes: n rows (images; tokens later), E experts, K topk.
    logits             [n, E], float
    probs              [n, E], weight of each chosen expert, zeros elsewhere: scores, divided by their sum over the
                       chosen ones when `renormalize`
    scores             [n, E], softmax over all experts (what load-balancing statistics need)
    lse                [n], log-sum-exp of the logits (what the z-loss needs)
    topk_indices       [n, K], int64, by falling logit; of equal logits the smaller index is chosen and comes first
    tokens_per_expert  [E], int32, how many rows chose each expert
    expert_offsets     [E + 1], int32, exclusive prefix sums of tokens_per_expert with the leading 0
    plan               [n * K], int64, flat positions `row * K + slot` sorted by expert, ascending within an expert
probs, scores and lse are float32 (float64 for float64 logits) and differentiable; the rest are integers.

Rules every back end keeps: arithmetic in float32 (float64); integers exact; K = E and n = 0 are valid; deterministic.

Launchers:
    topk_routing_fwd(logits, topk, renormalize)
        -> (probs, scores, lse, topk_indices, tokens_per_expert, expert_offsets, plan)
    topk_routing_bwd(grad_probs, grad_scores, grad_lse, probs, scores, topk_indices, renormalize) -> grad_logits
        each of the first three may be None; grad_logits has the dtype of `scores`.
    why_not(*args)
"""
