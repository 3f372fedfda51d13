"""Runs the frozen vision tower once over every image of the data sets, before training, and keeps what it gives."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from parrot_sys.data.feature_store import FeatureStore, tower_fingerprint
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import DataError
from parrot_sys.models.vision import VisionConfig

logger = logging.getLogger(__name__)
_IMAGES_PER_WRITE = 64


def open_store(
    directory: str | Path, tower: nn.Module, vision: VisionConfig, processor: ParrotProcessor
) -> FeatureStore:
    """The store of this tower with these weights, image preprocessing and selected layer."""
    settings = {**asdict(replace(vision, path=None)), **processor.image_processor.to_dict()}
    weights = dict([*tower.named_parameters(), *tower.named_buffers()])
    return FeatureStore(directory, tower_fingerprint(weights, sorted(settings.items())))


def fill_store(
    store: FeatureStore,
    paths: Iterable[str],
    tower: nn.Module,
    processor: ParrotProcessor,
    *,
    device: torch.device,
    on_bad_image: Literal["error", "skip"] = "error",
    num_workers: int = 2,
    progress: bool = True,
) -> int:
    """Computes and stores the features of images that have none yet; each rank takes its share.

    An interrupted run goes on where it was.

    Args:
        store: from `open_store`.
        paths: image files, the same on every rank.
        tower: [n, 3, h, w] -> [n, V, C].
        processor: reads and preprocesses images.
        device: where the tower is.
        on_bad_image: `error`, or `skip` to leave unreadable images without features (their samples are left out later).
        num_workers: threads that read images.
        progress: show a bar on rank 0.

    Returns:
        Images this rank computed.

    Raises:
        DataError: an image cannot be read.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    missing = store.missing(paths)
    dist.barrier()  # no rank may write before every rank has seen the same list
    mine = missing[rank::world_size]
    dtype = next(tower.parameters()).dtype
    if missing and rank == 0:
        logger.info("computing the features of %d images on %d processes", len(missing), world_size)
    with (
        ThreadPoolExecutor(num_workers, "parrot-images") as threads,
        tqdm(total=len(mine), desc="image features", unit="image", disable=not (progress and rank == 0)) as bar,
    ):
        for start in range(0, len(mine), _IMAGES_PER_WRITE):
            names = mine[start : start + _IMAGES_PER_WRITE]
            read = partial(_read, processor=processor, skip=on_bad_image == "skip")
            images = {
                name: image for name, image in zip(names, threads.map(read, names), strict=True) if image is not None
            }
            if images:
                with torch.no_grad():
                    features = tower(torch.cat(list(images.values())).to(device, dtype))
                store.write(store.keys(images), features)
            bar.update(len(names))
    dist.barrier()
    store.refresh()
    return len(mine)


def _read(name: str, *, processor: ParrotProcessor, skip: bool) -> Tensor | None:
    """[1, 3, h, w], or None for an unreadable image that may be skipped."""
    try:
        return processor.images([name])
    except DataError as error:
        if not skip:
            raise
        logger.warning("no features: %s", error)
        return None
