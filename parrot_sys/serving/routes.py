"""The field `parrot_routing` of an answer: which experts turned each picture, and what the router attended to."""

from __future__ import annotations

from typing import Any

from parrot_sys.routes import as_shares
from parrot_sys.serving.driver import AnswerStream
from parrot_sys.serving.token_texts import TokenTexts


def routing_field(stream: AnswerStream, texts: TokenTexts) -> dict[str, Any]:
    """Routes of the pictures of a request whose prompt has run; an empty list where pictures are not routed.

    The weights of a picture's experts sum to 1; means over its tiles, where it is cut into them.
    """
    images = []
    for index, image in enumerate(stream.images):
        if not image.route:
            continue
        probs = image.route[1].float().mean(0, keepdim=True)
        weights = [] if image.attention is None else image.attention.mean(0).tolist()
        images.append(
            {
                "index": index,
                "experts": as_shares(probs.cpu().numpy())[0].tolist() if probs.any() else None,
                "attention": _words(stream.guidance_ids, weights, texts),
            }
        )
    return {"parrot_routing": {"images": images}}


def _words(ids: list[int], weights: list[float], texts: TokenTexts) -> list[dict[str, Any]]:
    """Pieces of the prompt with the weights of their tokens; control tokens, which nobody sees, are left out."""
    words: list[dict[str, Any]] = []
    weight = 0.0
    for token, piece, own in zip(ids, texts.pieces(ids), weights, strict=False):
        if texts.is_control(token):
            continue
        weight += own
        if piece:
            words.append({"text": piece, "weight": weight})
            weight = 0.0
    return words
