"""Model of transformers over `ParrotForConditionalGeneration`: a thin class, which refuses what it does not support."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import PreTrainedModel

from parrot_sys.errors import CheckpointError, ConfigError, DataError
from parrot_sys.integrations.hugging_face.configuration import CONFIGURATIONS, ReleasedConfig
from parrot_sys.integrations.hugging_face.generation import generate_arguments, merged
from parrot_sys.integrations.hugging_face.refusals import asked_of_adapters, besides_hub, refuse
from parrot_sys.staging import scratch_directory

if TYPE_CHECKING:
    from parrot_sys.inference.inputs import Images
    from parrot_sys.inference.model import ParrotForConditionalGeneration

_GENERATION = "generation_config.json"


class ReleasedModel(PreTrainedModel, GenerationMixin):
    """An exported checkpoint as a model of transformers. Decoding runs on the engine of parrot_sys."""

    config_class = ReleasedConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = False  # the loss is a mean: Trainer divides by the steps that it accumulates

    def __init__(self, config: ReleasedConfig, model: ParrotForConditionalGeneration | None = None) -> None:
        """
        Args:
            config: of the checkpoint.
            model: from `load_pretrained`.

        Raises:
            ConfigError: there is no model: it needs weights, and is built by `parrot train` alone.
        """
        if model is None:
            raise ConfigError(
                f"{type(self).__name__} cannot be built from a configuration: load an exported directory with "
                "from_pretrained, or make one with `parrot train`"
            )
        super().__init__(config)
        self.parrot = model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: ReleasedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> ReleasedModel:
        """The model of an exported directory.

        Args:
            pretrained_model_name_or_path: the directory.
            config: of the directory; a changed one is refused.
            dtype: of the parameters; None and "auto" keep that of the checkpoint.
            torch_dtype: earlier name of `dtype`.
            device_map: one device for the whole model; "auto" is a GPU if there is one.
            kwargs: what says nothing of a local directory; all else is refused.

        Raises:
            ConfigError: an argument that is not supported, by its name.
            CheckpointError: see `parrot_sys.load_pretrained`.
        """
        directory = Path(pretrained_model_name_or_path)
        refuse(besides_hub(kwargs, "adapter_kwargs") | asked_of_adapters(kwargs.get("adapter_kwargs")))
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory} is no directory; wanted an exported checkpoint on this machine (one of a hub can be "
                "brought here with `hf download`)"
            )
        stored = cls.config_class.from_pretrained(directory)
        if config is not None:
            refuse(_differences(config, stored), "config.json decides; change it there")
        wanted = dtype if dtype is not None else torch_dtype
        from parrot_sys.inference.pretrained import load_pretrained

        model, _ = load_pretrained(directory, device=_device(device_map), dtype=None if wanted == "auto" else wanted)
        loaded = cls(stored, model)
        loaded.config.dtype = model.dtype
        loaded.generation_config = _generation_config(directory, model)
        return loaded.eval()

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.parrot.device

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return self.parrot.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReleasedModel:
        """Parameters stay where they are and what they are, whichever method asks (`to`, `cuda`, `half`, `float`, ...).

        Raises:
            ConfigError: they are to be elsewhere, or of another dtype.
        """
        try:
            moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        except (RuntimeError, AssertionError) as error:  # as torch says that there is no such device
            raise ConfigError(f"this model stays on {self.device}; load it with device_map: {error}") from error
        if moved.device != self.device:
            raise ConfigError(f"device {moved.device}: this model stays on {self.device}; load it with device_map")
        if moved.dtype != self.dtype:
            raise ConfigError(f"dtype {moved.dtype}: this model stays in {self.dtype}; load it with dtype")
        return super()._apply(fn, recurse)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Loss and logits; the rows of the logits are those of the ids with every picture in its place.

        Args:
            input_ids: int64 [B, N], -200 once for each picture.
            attention_mask: [B, N], 0 on padding.
            pixel_values: [n, 3, h, w] of the pictures, or of their tiles.
            image_sizes: [n, 2] height and width of pictures that are cut into tiles.
            labels: int64 [B, N], not shifted, -100 without loss.
            kwargs: must ask for nothing but `use_cache` and `return_dict`, which change nothing here.

        Raises:
            ConfigError: an argument that is not supported, by its name.
            DataError: the inputs do not fit together.
        """
        refuse({name: value for name, value in kwargs.items() if name not in ("use_cache", "return_dict")})
        images = self._pictures(pixel_values, image_sizes)
        output = self.parrot(input_ids, attention_mask=attention_mask, images=images, labels=labels)
        return CausalLMOutput(loss=output.loss, logits=output.logits)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        tokenizer: Any = None,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Prompts and answers, int64 [B, N + M].

        Args:
            inputs: see `input_ids`.
            generation_config: settings; those of the checkpoint when None.
            streamer: receives tokens as they come.
            input_ids: int64 [B, N] prompts, padded on the left.
            attention_mask, pixel_values, image_sizes: as in `forward`.
            tokenizer: needed for stop strings.
            seed: of the random numbers of each request.
            kwargs: settings that take the place of those in `generation_config`.

        Raises:
            ConfigError: a setting that the engine does not have, by its name.
            DataError: the inputs do not fit together, or a request is too long.
        """
        ids = inputs if input_ids is None else input_ids
        if ids is None:
            raise DataError("generate needs input_ids")
        settings = merged(self.generation_config, generation_config, kwargs)
        return self.parrot.generate(
            ids,
            attention_mask,
            self._pictures(pixel_values, image_sizes),
            streamer=streamer,
            tokenizer=tokenizer,
            seed=seed,
            **generate_arguments(settings, ids.shape[1]),
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes an exported directory: with nothing trained the same tensors and files that were loaded, bit for bit.

        Files that are there already stay, or are replaced by new ones of their names.

        Args:
            save_directory: made if it does not exist.
            is_main_process: all ranks of a layout call this, and the first one writes.
            state_dict: must be None: the model's own tensors are written.
            push_to_hub: must be False.
            safe_serialization: must be True.
            kwargs: must ask for nothing; `max_shard_size` and `token` say nothing here.
        """
        others = {name: value for name, value in kwargs.items() if name not in ("token", "max_shard_size")}
        refuse({"state_dict": state_dict, "push_to_hub": push_to_hub, **others})
        if not safe_serialization:
            raise ConfigError("safe_serialization=False: not supported by models of parrot_sys; leave it out")
        from parrot_sys.systems.export import export_released

        target = Path(save_directory)
        with scratch_directory(target) as scratch:
            export_released(self.parrot.model, scratch / "new", source=self.parrot.source)
            if is_main_process:
                _move_into(scratch / "new", target)

    def _pictures(self, pixels: Tensor | None, sizes: Tensor | Sequence[Sequence[int]] | None) -> Images:
        """Pictures as `ParrotForConditionalGeneration` takes them."""
        tiling = self.parrot.config.tiling
        if pixels is None or tiling is None:
            return pixels
        if sizes is None:
            raise DataError("image_sizes must come with pixel_values, as this model cuts pictures into tiles")
        from parrot_sys.data.picture import Picture

        rows = [tiling.rows(int(height), int(width)) for height, width in sizes]
        if (wanted := sum(each.tiles for each in rows)) != len(pixels):
            raise DataError(f"pixel_values must hold the {wanted} tiles of pictures of these sizes, got {len(pixels)}")
        parts = pixels.split([each.tiles for each in rows])
        return [Picture(part, each) for part, each in zip(parts, rows, strict=True)]


def _device(device_map: Any) -> torch.device | str | None:
    """One device; None (for `load_pretrained` a GPU if there is one) for "auto"."""
    if isinstance(device_map, Mapping) and len(device_map) == 1:
        device_map = next(iter(device_map.values()))
    if device_map is None:
        return "cpu"
    if device_map == "auto":
        return None
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return f"cuda:{device_map}"
    if isinstance(device_map, str | torch.device):
        return device_map
    raise ConfigError(f"device_map must name one device for the whole model, got {device_map!r}")


def _differences(given: ReleasedConfig, stored: ReleasedConfig) -> dict[str, Any]:
    """Fields of a configuration that are not those of the directory."""
    theirs, ours = given.to_dict(), stored.to_dict()
    about_files = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    attention = "attn_implementation"  # (from_pretrained of an Auto class puts it into the configuration)
    theirs[attention], ours[attention] = given._attn_implementation, stored._attn_implementation
    return {
        name: theirs.get(name, "(absent)")
        for name in theirs.keys() | ours.keys()
        if name not in about_files and theirs.get(name) != ours.get(name)
    }


def _generation_config(directory: Path, model: ParrotForConditionalGeneration) -> GenerationConfig:
    """As the directory says, with the ids that end an answer and fill a row."""
    held = (directory / _GENERATION).is_file()
    config = GenerationConfig.from_pretrained(directory) if held else GenerationConfig()
    config.eos_token_id = list(model.eos_token_ids)
    config.pad_token_id = model.pad_token_id
    return config


def _move_into(folder: Path, target: Path) -> None:
    """Moves all files of a folder over those of `target`; config.json last, so that a reader finds the rest."""
    target.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for file in sorted(files, key=lambda path: path.name == "config.json"):
        place = target / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)


def _class_of(configuration: type[ReleasedConfig]) -> type[ReleasedModel]:
    members = {"__module__": __name__, "config_class": configuration}
    return type(configuration.architecture, (ReleasedModel,), members)


MODELS: tuple[type[ReleasedModel], ...] = tuple(map(_class_of, CONFIGURATIONS.values()))
"""A class for each model_type, with the name that config.json gives as its architecture."""
globals().update({model.__name__: model for model in MODELS})
