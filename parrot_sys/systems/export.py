"""Write a model as a checkpoint in the released layout."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parrot_sys.files import read_json
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.state_dict import whole_tensors
from parrot_sys.models.tensor_files import TensorFiles, new_directory, write_tensors
from parrot_sys.systems.build import config_of
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.hf_config import EXPORTED_TOWER, config_to_hf, find_tower_directory
from parrot_sys.systems.maps import holds_tower, is_carried, parrot_maps
from parrot_sys.systems.registry import system_of

logger = logging.getLogger(__name__)

_PREPROCESSOR = "preprocessor_config.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedSource:
    """The released checkpoint that a model came from: what it holds besides the model's own tensors goes out again."""

    directory: Path
    hf: dict[str, Any]
    """Its config.json."""
    keep_dtypes: bool
    """Write each tensor in the dtype it had in the checkpoint (no dtype was asked for on loading)."""


def released_tensors(
    model: MultimodalModel | Sequence[MultimodalModel],
    *,
    with_vision_tower: bool = True,
    value: Callable[[Tensor], Tensor | None] = lambda tensor: tensor,
) -> Iterator[tuple[str, Tensor]]:
    """(released name, whole tensor) one after the other; every rank that holds a part of this copy must iterate.

    Args:
        model: the model, or all the parts that this rank holds.
        with_vision_tower: also the tower's, by their names inside the checkpoint.
        value: what to take for each parameter or buffer, such as its gradient; None leaves it out.
    """
    chunks = [model] if isinstance(model, MultimodalModel) else model
    maps = parrot_maps(config_of(chunks[0]), with_vision_tower=with_vision_tower)
    return whole_tensors(chunks, maps, value)


def export_tensors(
    model: MultimodalModel | Sequence[MultimodalModel], source: ReleasedSource | None
) -> Iterator[tuple[str, Tensor]]:
    """(released name, tensor) of everything that an export holds; every rank with a part of this copy must iterate.

    With a source, the set of names is the source's: the tower is inside if it was, and tensors that the model does not
    use are read from the source again. Without one the tower is inside whenever the model has it.
    """
    if source is None:
        yield from released_tensors(model)
        return
    parrot = config_of(model if isinstance(model, MultimodalModel) else model[0])
    with TensorFiles(source.directory, system_of(parrot).usual_name) as files:
        keys = files.names()
        dtypes = {key: files.dtype(key) for key in keys}
        for key, tensor in released_tensors(model, with_vision_tower=holds_tower(keys, parrot)):
            value = tensor.to(dtypes[key]) if source.keep_dtypes and key in dtypes else tensor
            yield files.stored_name(key), value
        for key in keys:
            if is_carried(key, parrot):
                yield files.stored_name(key), files.tensor(key)


def export_released(
    model: MultimodalModel | Sequence[MultimodalModel],
    directory: str | Path,
    *,
    source: ReleasedSource | None = None,
    save_processor: Callable[[Path], None] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Write the model as a complete checkpoint: config.json, safetensors, tokenizer and image preprocessing.

    The directory appears only when everything is in it. Every rank calls this; the first one writes.

    Args:
        model: the model, or all the parts that this rank holds.
        directory: to be created.
        source: checkpoint it came from; its other files are copied and its unknown settings kept.
        save_processor: writes tokenizer and preprocessor_config.json into a directory; not needed with a source.
        dtype: of the floating-point tensors, as they are when not given.
        overwrite: replace an existing directory.
        on_progress: called after each tensor.

    Raises:
        CheckpointError: the directory exists already.
    """
    tensors = _told(export_tensors(model, source), on_progress)
    if dtype is not None:
        tensors = ((key, tensor.to(dtype) if tensor.is_floating_point() else tensor) for key, tensor in tensors)
    if dist.get_rank() > 0:
        for _ in tensors:  # takes part in gathering the tensors
            pass
        return
    first = model if isinstance(model, MultimodalModel) else model[0]
    _write(first, tensors, Path(directory), source, save_processor, dtype, overwrite=overwrite)


def _write(
    model: MultimodalModel,
    tensors: Iterator[tuple[str, Tensor]],
    directory: Path,
    source: ReleasedSource | None,
    save_processor: Callable[[Path], None] | None,
    dtype: torch.dtype | None,
    *,
    overwrite: bool,
) -> None:
    """`model` is what the first pipeline stage holds first: vision tower and the system's modules."""
    config = config_of(model)
    with new_directory(directory, overwrite=overwrite) as target:
        if source is not None:
            _copy_files(source.directory, target)
        if save_processor is not None:
            save_processor(target)
        tower = find_tower_directory(source.hf, source.directory) if source else _path(config.vision.path)
        inside = model.vision_tower is not None and (source is None or _tower_inside(source, config))
        if tower is not None:
            _copy_files(tower, target / EXPORTED_TOWER, weights=not inside)
        hf = config_to_hf(config, source.hf if source else None, target, bypass=model.bridge.bypass)
        if (target / _PREPROCESSOR).is_file():
            hf.setdefault("image_aspect_ratio", read_json(target / _PREPROCESSOR).get("image_aspect_ratio", "square"))
        hf["torch_dtype"] = _dtype_name(model, source, dtype)
        if tower is not None:
            hf.setdefault("mm_vision_tower", EXPORTED_TOWER)
        (target / "config.json").write_text(json.dumps(hf, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_tensors(tensors, target)
    logger.info("wrote %s", directory)


def _told(tensors: Iterator[tuple[str, Tensor]], on_progress: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
    for each in tensors:
        yield each
        on_progress()


def _path(path: str | None) -> Path | None:
    return Path(path) if path else None


def _tower_inside(source: ReleasedSource, config: ParrotConfig) -> bool:
    with TensorFiles(source.directory, system_of(config).usual_name) as files:
        return holds_tower(files.names(), config)


def _dtype_name(model: MultimodalModel, source: ReleasedSource | None, dtype: torch.dtype | None) -> str:
    if dtype is None and source is not None and source.keep_dtypes and "torch_dtype" in source.hf:
        return str(source.hf["torch_dtype"])
    return str(dtype or model.config.params_dtype).removeprefix("torch.")


def _copy_files(source: Path, target: Path, *, weights: bool = False) -> None:
    """Copy the files of a checkpoint directory, without its weights unless asked for."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and (weights or not file.name.endswith(_WEIGHT_SUFFIXES)):
            shutil.copyfile(file, target / file.name)
