"""Rows that the decoder gets of the pictures of requests, from the caches or from the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from parrot_sys.engine.encoder_cache import EncoderCache
from parrot_sys.engine.requests import RequestImage
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride
from parrot_sys.towers import NEWLINE

Wanted = tuple[Sequence[RequestImage], Tensor, RoutingOverride | None]
"""Images of a request, ids of the text that guides their routes, and what replaces the routes."""


class PictureModel(Protocol):
    """The parts of a model that make rows of pictures."""

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""

    @property
    def rows_per_image(self) -> int:
        """V, or 1 where rows read their image from elsewhere."""

    def encode(self, pixels: Tensor) -> Tensor | None:
        """Features [n, V, C] of images [n, 3, h, w]; None where the vision tower is not."""

    def image_rows(
        self,
        features: Tensor | None,
        sources: Sequence[Tensor],
        guidance_ids: Tensor,
        lengths: Sequence[int],
        override: RoutingOverride | None,
    ) -> tuple[list[Tensor] | None, RoutingOutput | None]:
        """Rows that the decoder gets of pictures.

        Args:
            features: [n, V, C] of their n images; None where the vision tower is not.
            sources: int64 [R] for each picture, row of the n * V features that each of its rows takes, or NEWLINE.
            guidance_ids: int64 [G], texts that guide the routes, one after the other: one for each image.
            lengths: of the n texts.
            override: replaces the routes.

        Returns:
            [R', W] for each picture, None where the vision tower is not; and the routes of the images.
        """

    def guidance_weights(self, features: Tensor | None, guidance_ids: Tensor) -> Tensor | None:
        """Weights float32 [n, G] of the rows of a guiding text in what the router sees of it for each image.

        Args:
            features: [n, V, C]; None where the vision tower is not.
            guidance_ids: int64 [G], one text for all images.

        Returns:
            None where no text guides routes, or where the vision tower is not.
        """


class PictureEncoder:
    """Fills `RequestImage.rows`; runs the tower once for each picture that no cache has."""

    def __init__(self, model: PictureModel, cache: EncoderCache) -> None:
        self._model = model
        self._cache = cache

    def encode(self, wanted: Iterable[Wanted]) -> None:
        """Encodes all images of some requests, those of one step together."""
        todo: list[tuple[RequestImage, Tensor, RoutingOverride | None]] = []
        for images, guidance_ids, override in wanted:
            first = 0
            for image in images:
                own = slice(first, first + image.num_images)
                first += image.num_images
                if image.rows is not None:
                    continue
                if found := self._cache.routed.get((image.image, image.guidance)):
                    image.rows, image.route = found[0], found[1:]
                    continue
                replaced = override
                if override is not None and override.probs is not None:
                    replaced = RoutingOverride(probs=override.probs[own])
                todo.append((image, guidance_ids, replaced))
        self._add_features([image for image, _, _ in todo])
        plain = [each for each in todo if each[2] is None]
        for group in ([plain] if plain else []) + [[each] for each in todo if each[2] is not None]:
            self._route(group)

    def attend(self, images: Sequence[RequestImage], guidance_ids: Tensor) -> None:
        """Fills `RequestImage.attention` of the images of one request."""
        if not images:
            return
        self._add_features(images)
        known = [image.features for image in images if image.features is not None]
        features = torch.cat(known) if len(known) == len(images) else None
        weights = self._model.guidance_weights(features, guidance_ids)
        for image in images:
            image.features = None if image.pixels is not None else image.features
        if weights is not None:
            counts = [image.num_images for image in images]
            for image, own in zip(images, weights.split(counts), strict=True):
                image.attention = own

    def _add_features(self, images: Sequence[RequestImage]) -> None:
        """Runs the tower on pictures whose features are not known, each once."""
        missing: dict[bytes, list[RequestImage]] = {}
        for image in images:
            if image.features is not None:
                continue
            if found := self._cache.features.get(image.image):
                image.features = found[0]
            else:
                missing.setdefault(image.image, []).append(image)
        if not missing:
            return
        pixels = [own[0].pixels for own in missing.values()]
        features = self._model.encode(torch.cat([each for each in pixels if each is not None]))
        self._cache.pictures_encoded += len(missing)
        if features is None:
            return
        counts = [own[0].num_images for own in missing.values()]
        for own, rows in zip(missing.values(), features.split(counts), strict=True):
            self._cache.features.put(own[0].image, (rows,))
            for image in own:
                image.features = rows

    def _route(self, group: Sequence[tuple[RequestImage, Tensor, RoutingOverride | None]]) -> None:
        known = [image.features for image, _, _ in group if image.features is not None]
        features = torch.cat(known) if len(known) == len(group) else None
        texts = [guidance_ids for image, guidance_ids, _ in group for _ in range(image.num_images)]
        lengths, sources, first = [len(text) for text in texts], [], 0
        for image, _, _ in group:
            sources.append(torch.where(image.source == NEWLINE, NEWLINE, image.source + first))
            first += image.num_images * self._model.rows_per_image
        rows, routing = self._model.image_rows(features, sources, torch.cat(texts), lengths, group[0][2])
        routes: list[tuple[Tensor, ...]] = [()] * len(group)
        if routing is not None:
            counts = [image.num_images for image, _, _ in group]
            parts = [part for part in (routing.logits, routing.probs, routing.topk_indices) if part is not None]
            routes = list(zip(*(part.split(counts) for part in parts), strict=True))
        for place, ((image, _, _), route) in enumerate(zip(group, routes, strict=True)):
            # (A later pipeline stage embeds nothing.)
            image.rows, image.route = torch.empty(0, 0) if rows is None else rows[place], route
            image.features = None if image.pixels is not None else image.features
            if rows is not None:
                self._cache.routed.put((image.image, image.guidance), (image.rows, *route))
