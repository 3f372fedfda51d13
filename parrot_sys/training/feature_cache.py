"""Runs the frozen vision tower once over every image of the data sets, before training, and keeps what it gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from parrot_sys.data.feature_store import FeatureStore, tile_keys, tower_fingerprint
from parrot_sys.data.image_files import ImageFile
from parrot_sys.data.picture import Picture
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.step_loader import StepLoader
from parrot_sys.errors import DataError, StorageError
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime import optimizer as megatron_optimizer
from parrot_sys.megatron.state_dict import tower_tensors
from parrot_sys.parallel.agreement import gather_everywhere
from parrot_sys.towers import VisionConfig
from parrot_sys.training.config import TrainConfig

logger = logging.getLogger(__name__)
_IMAGES_PER_WRITE = 64
_FILES_PER_LOOK = 1024


def cache_features(
    config: TrainConfig,
    model: MultimodalModel,
    processor: ParrotProcessor,
    loaders: Sequence[StepLoader],
    device: torch.device,
    *,
    on_progress: Callable[[], None],
) -> None:
    """Computes what is missing for the images of `loaders`, which take features from the store from then on.

    Args:
        config: of the run.
        model: the first part of the model on this rank.
        processor: reads and preprocesses images.
        loaders: of training and held-out records.
        device: where the model is.
        on_progress: as in `fill_store`.

    Raises:
        DataError: an image cannot be read.
    """
    directory = Path(config.data.cache_dir or config.output) / "features"
    store = open_store(directory, tower_tensors(model), config.model.vision, processor)
    copies = megatron_optimizer.replica_group()
    fill_store(
        store,
        {name: picture for loader in loaders for name, picture in loader.pictures().items()},
        model.vision_tower,
        processor,
        device=device,
        part=(dist.get_rank(copies), dist.get_world_size(copies)),
        write=megatron_optimizer.tensor_parallel_rank() == 0,
        on_bad_image=config.data.on_bad_sample,
        num_workers=config.data.num_workers,
        progress=config.logging.progress,
        on_progress=on_progress,
    )
    for loader in loaders:
        loader.use_features(store)


def open_store(
    directory: str | Path, weights: Mapping[str, Tensor], vision: VisionConfig, processor: ParrotProcessor
) -> FeatureStore:
    """The store of a tower with these (whole) weights, image preprocessing and selected layer; every rank calls this.

    Those of rank 0 count: later pipeline stages hold no tower.
    """
    settings = {**asdict(replace(vision, path=None)), **processor.image_settings()}
    fingerprint = [tower_fingerprint(dict(weights), sorted(settings.items())) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(fingerprint, src=0)
    return FeatureStore(directory, fingerprint[0])


def fill_store(
    store: FeatureStore,
    pictures: Mapping[str, ImageFile],
    tower: nn.Module | None,
    processor: ParrotProcessor,
    *,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    write: bool = True,
    on_bad_image: Literal["error", "skip"] = "error",
    num_workers: int = 2,
    progress: bool = True,
    on_progress: Callable[[], None] = lambda: None,
) -> int:
    """Computes and stores the features of images that have none yet; every rank calls this, and may again to go on.

    Args:
        store: from `open_store`.
        pictures: name -> image file, the same names on every rank.
        tower: [n, 3, h, w] -> [n, V, C]; None on ranks that hold none.
        processor: reads and preprocesses images.
        device: where the tower is.
        part: number of this rank's copy of the tower, and how many copies there are: they share the images.
        write: False on ranks that only help to compute (a tower that is cut over tensor-parallel ranks).
        on_bad_image: `error`, or `skip` to leave unreadable images without features (their samples are left out later).
        num_workers: threads that read images.
        progress, on_progress: show a bar on rank 0; called when all ranks have come on by some images.

    Returns:
        Images this rank computed.

    Raises:
        DataError: an image cannot be read; on every rank.
    """
    rank, skip = dist.get_rank(), on_bad_image == "skip"
    missing, known = _seen_by_rank_0(store, pictures, skip, on_progress)
    failures: dict[str, str] = {}
    mine = missing[part[0] :: part[1]] if tower is not None else []
    if missing and rank == 0:
        logger.info("computing the features of %d images with %d copies of the tower", len(missing), part[1])
    with (
        ThreadPoolExecutor(num_workers, "parrot-images") as threads,
        tqdm(total=len(mine), desc="image features", unit="image", disable=not (progress and rank == 0)) as bar,
    ):
        # As many rounds on every rank, also on those that have no tower: one that waits has to see that others work.
        for start in range(0, -(-len(missing) // part[1]), _IMAGES_PER_WRITE):
            files = [pictures[name] for name in mine[start : start + _IMAGES_PER_WRITE]]
            images, bad = _read_some(files, threads, processor, skip=skip)
            on_progress()
            failures |= dict(zip(store.keys(bad), bad.values(), strict=True))
            if images and tower is not None:
                features = _features(tower, images.values(), device)
                if write:
                    store.write(_tile_keys(store, images), features)
            bar.update(len(files))
    _share_failures(store, known | failures)
    if mine:
        processor.image_processor.notes.log_counts()
    store.refresh()
    return len(mine)


def _seen_by_rank_0(
    store: FeatureStore, pictures: Mapping[str, ImageFile], skip: bool, on_progress: Callable[[], None]
) -> tuple[list[str], dict[str, str]]:
    """Pictures without features, and failures so far: one list for all, as a file that some ranks cannot read must not
    shift the shares; and no rank writes before every rank has looked."""
    seen: list[Any] = [(_missing(store, pictures, skip, on_progress), store.failures)]
    dist.broadcast_object_list(seen, src=0)
    missing, failures = seen[0]
    return missing, failures


def _read_some(
    files: Sequence[ImageFile], threads: Executor, processor: ParrotProcessor, *, skip: bool
) -> tuple[dict[ImageFile, Picture], dict[ImageFile, str]]:
    """Pictures of the files, and why others have none; every rank calls this as often.

    Raises:
        DataError: some rank cannot read one, and they are not to be skipped; on every rank.
    """
    loaded = list(zip(files, threads.map(partial(_read, processor=processor), files), strict=True))
    bad = {file: str(error) for file, error in loaded if isinstance(error, DataError)}
    everyone = gather_everywhere(next(iter(bad.values()), None))
    if not skip and (message := next(filter(None, everyone), None)) is not None:
        raise DataError(message)
    return {file: image for file, image in loaded if isinstance(image, Picture)}, bad


def _tile_keys(store: FeatureStore, images: Mapping[ImageFile, Picture]) -> list[str]:
    """Keys of all tiles of some pictures."""
    return tile_keys(store.keys(images), [len(image.pixel_values) for image in images.values()])


@torch.no_grad()
def _features(tower: nn.Module, images: Iterable[Picture], device: torch.device) -> Tensor:
    """[n, V, C] of all tiles of some pictures."""
    pixels = torch.cat([image.pixel_values for image in images])
    features: Tensor = tower(pixels.to(device, next(tower.parameters()).dtype))
    return features


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


def _missing(
    store: FeatureStore, pictures: Mapping[str, ImageFile], skip: bool, on_progress: Callable[[], None]
) -> list[str]:
    """Names of files whose features are not stored yet."""
    files = [pictures[name] for name in sorted(pictures)]
    for start in range(0, len(files), _FILES_PER_LOOK):  # the store remembers what it has read
        store.missing(files[start : start + _FILES_PER_LOOK], skip_unreadable=skip)
        on_progress()
    return store.missing(files, skip_unreadable=skip)


def _read(picture: ImageFile, *, processor: ParrotProcessor) -> Picture | DataError:
    """The picture, or the reason why there is none."""
    try:
        return processor.pictures([picture])[0]
    except StorageError:
        raise
    except DataError as error:
        return error
