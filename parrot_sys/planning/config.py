"""PlanConfig: the model, the data and the cluster that `parrot plan` is asked about."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from parrot_sys.config_values import BY_KEY
from parrot_sys.errors import ConfigError
from parrot_sys.paths import OUTPUT_FILE
from parrot_sys.planning.cluster import ClusterConfig
from parrot_sys.systems.base import OTHERS
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.job import make_job
from parrot_sys.systems.registry import system_of
from parrot_sys.systems.system_costs import Job, MicroBatch
from parrot_sys.towers import PictureRows
from parrot_sys.training.config import TrainConfig

_LEAST = {"images": 0, "picture_height": 1, "picture_width": 1, "text_tokens": 1, "label_tokens": 0}
"""Of the settings of a sample."""


@dataclass(kw_only=True, frozen=True, slots=True)
class SampleConfig:
    """A typical sample; packing puts several into a micro-batch without padding."""

    images: int = 1
    """Pictures."""
    picture_height: int = 672
    """Height of a picture in pixels; with the width it decides the tiles of a model that cuts pictures."""
    picture_width: int = 672
    """Width of a picture in pixels."""
    text_tokens: int = 256
    """Text rows: prompt and answer."""
    label_tokens: int = 128
    """Text rows that bear loss; only these go through the LM head."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"sample.{name} must be >= {least}, got {getattr(self, name)}")
        if self.label_tokens > self.text_tokens:
            raise ConfigError(
                f"sample.label_tokens must be <= sample.text_tokens={self.text_tokens}, got {self.label_tokens}"
            )


@dataclass(kw_only=True, frozen=True, slots=True)
class FixConfig:
    """Choices that are already made; the rest is searched."""

    tensor: int | None = None
    """Tensor-parallel ranks."""
    sequence: bool | None = None
    """Sequence parallelism (tried wherever there is tensor parallelism)."""
    pipeline: int | None = None
    """Pipeline-parallel ranks."""
    virtual: int | None = None
    """Chunks of layers of a pipeline rank (interleaved schedule); 1 for the plain one."""
    context: int | None = None
    """Context-parallel ranks (tried from samples of 4,096 rows on)."""
    expert: int | None = None
    """Expert-parallel ranks."""
    expert_tensor: int | None = None
    """Ranks that share each expert (1 and the tensor-parallel size are tried)."""
    samples: int | None = None
    """Samples of a micro-batch."""
    recompute: Literal["none", "full"] | None = None
    """Recomputation of the decoder's activations."""
    distributed_optimizer: bool | None = None
    """Split the optimizer's state over the data-parallel ranks (ZeRO-1)."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual", "context", "expert", "expert_tensor", "samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"fix.{name} must be >= 1, got {value}")


@dataclass(kw_only=True, frozen=True, slots=True)
class ScalingConfig:
    """A table over numbers of GPUs in place of one cluster."""

    gpus: tuple[int, ...] = ()
    """Numbers of GPUs, each with its best layout; `cluster.nodes` is not used then."""
    samples_per_gpu: int | None = None
    """Samples of a step for each GPU (weak scaling); `global_batch_size` stays the same when not set."""

    def __post_init__(self) -> None:
        if any(number < 1 for number in self.gpus):
            raise ConfigError(f"scaling.gpus must be >= 1, got {min(self.gpus)}")
        if self.samples_per_gpu is not None and self.samples_per_gpu < 1:
            raise ConfigError(f"scaling.samples_per_gpu must be >= 1, got {self.samples_per_gpu}")


@dataclass(kw_only=True, frozen=True)
class PlanConfig:
    """Settings of a plan."""

    model: ParrotConfig = field(default_factory=ParrotConfig)
    """Sizes and options of the model."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """GPUs and links."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """A typical sample."""
    fix: FixConfig = field(default_factory=FixConfig)
    """Parts of the layout that are decided already."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """A table over numbers of GPUs."""
    trainable: Annotated[dict[str, bool], BY_KEY] = field(default_factory=dict)
    """Part of the model -> whether it learns; parts that are not named learn, but the vision tower does not."""
    bypass: tuple[str, ...] = ()
    """Parts that are kept as they are, frozen, and passed by (see `parrot train --help`)."""
    global_batch_size: int = 128
    """Samples of a step over all ranks and micro-batches."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of parameters and activations; bf16 keeps fp32 main parameters and gradients in the optimizer."""
    top: int = 10
    """Layouts in the table, fastest first."""
    json: bool = False
    """Print JSON in place of the table and the words."""
    plot: Annotated[str | None, OUTPUT_FILE] = None
    """Also write a figure to this file (.svg, .png or .pdf)."""

    renamed: ClassVar[dict[str, str]] = TrainConfig.renamed

    def __post_init__(self) -> None:
        per_node = self.cluster.gpus_per_node
        for number in self.scaling.gpus:
            if number > per_node and number % per_node:
                raise ConfigError(
                    f"scaling.gpus above cluster.gpus_per_node={per_node} must be multiples of it, got {number}: "
                    f"the nearest are {number // per_node * per_node} and {(number // per_node + 1) * per_node}"
                )
        for name in ("global_batch_size", "top"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        self._check_rows()
        if self.plot is not None and not self.plot.endswith((".svg", ".png", ".pdf")):
            raise ConfigError(f"plot must name a .svg, .png or .pdf file, got {self.plot!r}")
        system = system_of(self.model)
        system.check_parts(self.trainable.keys() - {OTHERS}, "trainable")
        system.check_bypass(self.bypass)
        if self.model.vision.tower.transformer is None and self.learning()["vision"]:
            raise ConfigError(
                f"vision.type {self.model.vision.type} can be planned with a frozen tower only, got "
                "trainable.vision=true: choose a transformer, or freeze it"
            )

    def _check_rows(self) -> None:
        """
        Raises:
            ConfigError: samples are longer than the model takes, or have more images.
        """
        section, most_images = self.model.section, self.model.most_images
        if section is not None and most_images is not None and self.sample.images > most_images:
            raise ConfigError(
                f"sample.images must be <= {most_images} under the rule {section.rule!r} of model.{section.key}, "
                f"got {self.sample.images}: choose another rule"
            )
        if self.rows > self.model.max_rows:
            name, most = min(self.model.limits.items(), key=lambda limit: limit[1])
            raise ConfigError(
                f"sample.text_tokens + sample.images x {len(self.picture.source)} rows a picture must be <= "
                f"{name}={most}, got {self.rows}: raise {name} or shorten it"
            )

    @functools.cached_property
    def picture(self) -> PictureRows:
        """Tiles of a picture, and its rows among those of the text."""
        tiling, sample = self.model.tiling, self.sample
        if tiling is None:
            return PictureRows.whole(self.model.rows_per_image)
        return tiling.rows(sample.picture_height, sample.picture_width)

    @property
    def rows(self) -> int:
        """Rows of a sample: text and visual."""
        return self.sample.text_tokens + self.sample.images * len(self.picture.source)

    def learning(self) -> dict[str, bool]:
        """Part of the model -> whether it learns."""
        return system_of(self.model).learning(self.model, self.trainable, self.bypass)

    def job(self) -> Job:
        """The model as the cost formulas take it."""
        return make_job(self.model, self.learning(), precision=self.precision, bypass=self.bypass)

    def micro_batch(self, samples: float) -> MicroBatch:
        """Sizes of a micro-batch of `samples` typical samples."""
        sample, rows = self.sample, self.rows
        return MicroBatch(
            rows=samples * rows,
            images=samples * sample.images * self.picture.tiles,
            visual_rows=samples * sample.images * len(self.picture.source),
            guidance_rows=samples * (sample.text_tokens - sample.label_tokens) if sample.images else 0,
            label_rows=samples * sample.label_tokens,
            squared_lengths=samples * rows**2,
            samples=samples,
        )
