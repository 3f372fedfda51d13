"""Runs the frozen vision tower once over every image of the data sets, before training, and keeps what it gives."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
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
    directory: str | Path, weights: Mapping[str, Tensor], vision: VisionConfig, processor: ParrotProcessor
) -> FeatureStore:
    """The store of a tower with these (whole) weights, image preprocessing and selected layer; every rank calls this.

    Those of rank 0 count: later pipeline stages hold no tower.
    """
    settings = {**asdict(replace(vision, path=None)), **processor.image_processor.to_dict()}
    fingerprint = [tower_fingerprint(dict(weights), sorted(settings.items())) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(fingerprint, src=0)
    return FeatureStore(directory, fingerprint[0])


def fill_store(
    store: FeatureStore,
    paths: Iterable[str],
    tower: nn.Module | None,
    processor: ParrotProcessor,
    *,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    write: bool = True,
    on_bad_image: Literal["error", "skip"] = "error",
    num_workers: int = 2,
    progress: bool = True,
) -> int:
    """Computes and stores the features of images that have none yet; every rank calls this.

    An interrupted run goes on where it was.

    Args:
        store: from `open_store`.
        paths: image files, the same on every rank.
        tower: [n, 3, h, w] -> [n, V, C]; None on ranks that hold none.
        processor: reads and preprocesses images.
        device: where the tower is.
        part: number of this rank's copy of the tower, and how many copies there are: they share the images.
        write: False on ranks that only help to compute (a tower that is cut over tensor-parallel ranks).
        on_bad_image: `error`, or `skip` to leave unreadable images without features (their samples are left out later).
        num_workers: threads that read images.
        progress: show a bar on rank 0.

    Returns:
        Images this rank computed.

    Raises:
        DataError: an image cannot be read.
    """
    rank = dist.get_rank()
    missing = store.missing(paths)
    dist.barrier()  # no rank may write before every rank has seen the same list
    mine = missing[part[0] :: part[1]] if tower is not None else []
    if missing and rank == 0:
        logger.info("computing the features of %d images with %d copies of the tower", len(missing), part[1])
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
            if images and tower is not None:
                with torch.no_grad():
                    features = tower(torch.cat(list(images.values())).to(device, next(tower.parameters()).dtype))
                if write:
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
