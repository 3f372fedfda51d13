"""The field `parrot_routing` of an answer: which experts turned each picture, and what the router attended to."""

from __future__ import annotations

from typing import Any

from parrot_sys.routes import as_shares
from parrot_sys.serving.driver import AnswerStream


def routing_field(stream: AnswerStream) -> dict[str, Any]:
    """Routes of the pictures of a request whose prompt has run."""
    images: list[dict[str, Any]] = []
    for index, image in enumerate(stream.images):
        if not image.route:
            continue
        probs = image.route[1].float()
        experts = as_shares(probs.mean(0, keepdim=True).numpy())[0].tolist() if probs.any() else None
        images.append({"index": index, "experts": experts, "attention": []})
    return {"parrot_routing": {"images": images}}
