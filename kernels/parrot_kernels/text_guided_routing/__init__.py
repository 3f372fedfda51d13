"""Contract of `text_guided_routing`: one set of router logits per image, guided by the text of its sample.

For image s with text span t in [text_start[s], text_end[s]):
    a[s, t]   = softmax over t of scale * query[s] . text[t]
    logits[s] = sum over t of a[s, t] * (text[t] @ router_weight.T)
This equals `(softmax(query @ text.T * scale) @ text) @ router_weight.T` (Parrot, arXiv 2406.02539, eq. 2 and 3) with
the router applied first, so that no hidden-wide context is formed and each text row is read once in the forward pass.

Shapes: S images, T text rows, H hidden_size, E experts.
    query          [S, H], float; the last dimension contiguous
    text           [T, H], dtype of query
    text_start     [S], int32 or int64; text_end the same; 0 <= start, end <= T
    router_weight  [E, H], dtype of query
    logits         [S, E], lse [S] (log-sum-exp of the scaled scores): float32 (float64 for float64 inputs)

Rules every back end keeps:
    * arithmetic in float32 (float64 for float64 inputs) whatever the input dtype;
    * an empty span (end <= start) gives zero logits, hence uniform routing, lse = -inf and no gradients;
    * spans may be shared or overlap; their text gradients are summed in a fixed order (deterministic);
    * S = 0 and T = 0 are valid, and the gradients are zeros then;
    * gradients that are not needed are neither computed nor allocated: an empty [0] tensor stands for them.

Launchers (same names and signatures in every back end):
    text_guided_routing_fwd(query, text, text_start, text_end, router_weight, scale) -> (logits, lse)
    text_guided_routing_bwd(grad_logits, grad_lse, query, text, text_start, text_end, router_weight, logits, lse, scale,
                            needs) -> (grad_query, grad_text, grad_router_weight)
        grad_lse may be None; needs = (query, text, router_weight) bools.
    why_not(*args) -> None, or the reason why this back end cannot take these forward arguments (without arguments: why
        it cannot run on this machine). Called before a launcher; it also loads what the launcher needs.
"""
