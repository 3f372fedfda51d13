"""Runs the frozen vision tower once over every image of the data sets, before training, and keeps what it gives."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
    rank, skip = dist.get_rank(), on_bad_image == "skip"
    # One list for all: a file that some ranks cannot read must not shift the shares.
    seen: list[Any] = [(store.missing(paths, skip_unreadable=skip), store.failures)]
    dist.broadcast_object_list(seen, src=0)  # (also: no rank may write before every rank has looked)
    missing: list[str] = seen[0][0]
    failures: dict[str, str] = {}
    mine = missing[part[0] :: part[1]] if tower is not None else []
    if missing and rank == 0:
        logger.info("computing the features of %d images with %d copies of the tower", len(missing), part[1])
    with (
        ThreadPoolExecutor(num_workers, "parrot-images") as threads,
        tqdm(total=len(mine), desc="image features", unit="image", disable=not (progress and rank == 0)) as bar,
    ):
        for start in range(0, len(mine), _IMAGES_PER_WRITE):
            names = mine[start : start + _IMAGES_PER_WRITE]
            read = partial(_read, processor=processor, skip=skip)
            loaded = dict(zip(names, threads.map(read, names), strict=True))
            images = {name: image for name, image in loaded.items() if isinstance(image, Tensor)}
            bad = {name: str(error) for name, error in loaded.items() if isinstance(error, DataError)}
            failures |= dict(zip(store.keys(bad), bad.values(), strict=True))
            if images and tower is not None:
                with torch.no_grad():
                    features = tower(torch.cat(list(images.values())).to(device, next(tower.parameters()).dtype))
                if write:
                    store.write(store.keys(images), features)
            bar.update(len(names))
    _share_failures(store, seen[0][1] | failures)
    if mine:
        processor.image_processor.notes.log_counts()
    store.refresh()
    return len(mine)


def _share_failures(store: FeatureStore, own: Mapping[str, str]) -> None:
    """Every rank learns why an image has no features: whichever needs it names the reason."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for failures in everyone:
        store.failures.update(failures)
    if store.failures and dist.get_rank() == 0:
        reasons = list(store.failures.values())
        logger.warning(
            "%d images have no features, their samples are left out; the first: %s", len(reasons), reasons[0]
        )


def _read(name: str, *, processor: ParrotProcessor, skip: bool) -> Tensor | DataError:
    """[1, 3, h, w], or the reason why an image that may be skipped has none."""
    try:
        return processor.images([name])
    except DataError as error:
        if not skip:
            raise
        return error
