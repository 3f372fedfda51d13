"""Contract of `topk_routing`: scores, the K best experts of each row, their weights, statistics and the dispatch plan.

Shapes: n rows (images or tokens), E experts, K topk.
    logits             [n, E], float
    expert_bias        [E] float or None; takes part in the selection only, and has no gradient
    probs              [n, E], weight of each chosen expert, zeros elsewhere: its score, divided by (the sum of the
                       chosen scores + 1e-20) when `renormalize`, times `scaling_factor`
    scores             [n, E], softmax of the logits over all experts, or their sigmoid, by `score_function`
    lse                [n], log-sum-exp of the logits
    score_sums         [E], sum over the rows of the scores, each row divided by its sum + 1e-20 under `sigmoid` (what
                       load-balancing losses need besides tokens_per_expert)
    z_sum              [], sum of lse squared (what the z-loss needs)
    topk_indices       [n, K], int64, best first
    tokens_per_expert  [E], int32, how many rows chose each expert
    expert_offsets     [E + 1], int32, exclusive prefix sums of tokens_per_expert with the leading 0
    plan               [n * K], int64, flat positions `row * K + slot` sorted by expert, ascending within an expert
The first five outputs are float32 (float64 for float64 logits) and differentiable; the rest are integers.

Selection. Experts are ordered by logit, or with a bias by score + bias; NaN counts as the largest. Of equal ones the
smaller index is chosen and comes first. With num_groups > 1 the experts form groups of E / num_groups neighbours, and
only those of the `topk_groups` best groups may be chosen (DeepSeek-V3, arXiv 2412.19437, and Megatron-Core). A group
counts the sum, in falling order, of its best max(1, K // topk_groups) values: score + bias; without a bias the scores,
or the logits for a renormalised softmax (Megatron's softmax after the selection). Of equal groups the first is chosen.

Rules every back end keeps: arithmetic in float32 (float64); integers exact; K = E and n = 0 are valid; n * K < 2**31;
deterministic.

Launchers (callers have checked 1 <= topk <= topk_groups * (E / num_groups), topk_groups <= num_groups, num_groups | E):
    topk_routing_fwd(logits, topk, renormalize, score_function="softmax", scaling_factor=1.0, num_groups=1,
                     topk_groups=1, expert_bias=None)
        -> (probs, scores, lse, score_sums, z_sum, topk_indices, tokens_per_expert, expert_offsets, plan)
    topk_routing_bwd(grad_probs, grad_scores, grad_lse, grad_score_sums, grad_z_sum, logits, topk_indices, renormalize,
                     score_function, scaling_factor) -> grad_logits
        each of the first five may be None; grad_logits has the dtype of `logits`.
    why_not(*args) takes the arguments of topk_routing_fwd; the back end that ran the forward pass need not run the
        backward pass, which recomputes the scores from the logits.
"""
