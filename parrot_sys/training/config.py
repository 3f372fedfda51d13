"""TrainConfig: everything that decides a training run, checked before any work is done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from parrot_sys.config_values import BY_KEY
from parrot_sys.data.config import DataConfig
from parrot_sys.errors import ConfigError
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.models.llm import TokenExpertsConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.parallel import check_experts
from parrot_sys.paths import INPUT, INPUT_FILE, INPUT_FOLDER, OUTPUT_FOLDER
from parrot_sys.systems.base import OTHERS
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.registry import all_parts, system_of
from parrot_sys.training.trackers.registry import TrackerName

_MOST_SAMPLES = 256


@dataclass(kw_only=True, frozen=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; the defaults are those of Parrot's second stage."""

    lr: float = 2e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_fraction: float = 0.03
    """Part of all steps that warm up, when `warmup_steps` is not set."""
    warmup_steps: int | None = None
    """Steps of warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms never decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's averages."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest norm of all gradients together; 0 does not clip."""
    lrs: Annotated[dict[str, float], BY_KEY] = field(default_factory=dict)
    """Part of the model -> its peak learning rate, when it differs from `lr` (`--optimizer.lrs.llm 1e-5`). `router`,
    within Parrot's experts and Wings' textual learners, may have one as well; it learns whenever these do."""
    distributed: bool = False
    """Split the optimizer's state over the data-parallel ranks (Megatron's distributed optimizer)."""

    renamed: ClassVar[dict[str, str]] = {f"{part}_lr": f"lrs.{part}" for part in all_parts()}

    def __post_init__(self) -> None:
        for name, value in {"lr": self.lr, **{f"lrs.{part}": lr for part, lr in self.lrs.items()}}.items():
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(
                    f"optimizer.{name} must be a finite number > 0, got {value}; "
                    "freeze a part with trainable.<part> false"
                )
            if self.min_lr > value:
                raise ConfigError(f"optimizer.min_lr must be <= optimizer.{name}={value}, got {self.min_lr}")
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(f"optimizer.warmup_fraction must be in [0, 1), got {self.warmup_fraction}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ConfigError(f"optimizer.warmup_steps must be >= 0, got {self.warmup_steps}")
        for name in ("min_lr", "weight_decay", "clip_grad"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"optimizer.{name} must be a finite number >= 0, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas must lie in [0, 1), got {self.betas}")
        if not (self.eps > 0 and math.isfinite(self.eps)):
            raise ConfigError(f"optimizer.eps must be a finite number > 0, got {self.eps}")


@dataclass(kw_only=True, frozen=True, slots=True)
class ValidationConfig:
    """Loss on held-out records during training (the mean over their labels); off without paths."""

    paths: Annotated[tuple[str, ...], INPUT_FILE] = ()
    """Record files, in the format of `data.paths`."""
    image_roots: Annotated[tuple[str, ...], INPUT] = ()
    """Where their images are, as `data.image_roots` (default: the directory of each file)."""
    interval: int = 500
    """Steps between validations; one more follows the last step."""
    batches: int = 20
    """Global batches a validation reads at most."""

    def __post_init__(self) -> None:
        for name in ("interval", "batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"validation.{name} must be >= 1, got {getattr(self, name)}")
        if self.image_roots and not self.paths:
            raise ConfigError(
                f"validation.image_roots needs validation.paths, got image roots {', '.join(self.image_roots)} and no "
                "paths: name the records, or unset it"
            )


@dataclass(kw_only=True, frozen=True, slots=True)
class CheckpointConfig:
    """Training checkpoints below OUTPUT/checkpoints; the released layout is written to OUTPUT/hf at the end."""

    interval: int = 1000
    """Steps between checkpoints; one more follows the last step."""
    keep_last: int = 2
    """Newest checkpoints that are kept; older ones are removed."""
    keep_every: int | None = None
    """Checkpoints at multiples of this number of steps are never removed; a multiple of `interval`."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory that is as large as a rank's share."""
    verify: bool = True
    """Compare every file with its checksum before a checkpoint is loaded; a damaged one is left out."""
    load_from: Annotated[str | None, INPUT_FOLDER] = None
    """Weights to start from: a model in the released layout, a training checkpoint, or the output of another run."""
    allow_differences: tuple[str, ...] = ()
    """Constants of the model (`model.llm.rope_base`) that may differ from those of the weights in `load_from`."""
    allow_non_finite: bool = False
    """Load NaN and infinite weights with a warning; otherwise they are an error that names their tensors."""
    resume: bool = True
    """Go on from the newest valid checkpoint of the output directory."""
    export: bool = True
    """Write the model in the released layout at the end."""

    def __post_init__(self) -> None:
        for name in ("interval", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"checkpoint.{name} must be >= 1, got {getattr(self, name)}")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.interval):
            below = self.keep_every // self.interval * self.interval
            near = f"{below} or {below + self.interval}" if below > 0 else f"{self.interval}"
            raise ConfigError(
                f"checkpoint.keep_every must be a multiple of checkpoint.interval={self.interval}, "
                f"got {self.keep_every}: set {near}"
            )


@dataclass(kw_only=True, frozen=True, slots=True)
class FaultConfig:
    """Reactions to a step or a process that goes wrong (docs/fault_tolerance.md)."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When the loss or the gradient of a step is no number: end the run, or go on without the step's update."""
    spike_factor: float | None = None
    """A loss above this many times the median of the last `spike_window` steps is a spike; unset looks for none."""
    spike_window: int = 64
    """Steps whose median a loss is compared with; nothing is a spike before half of them are done."""
    on_spike: Literal["stop", "skip"] = "skip"
    """At a spike: end the run, or go on without the step's update."""
    max_consecutive_skips: int = 10
    """Steps left out one after the other before the run ends."""
    hang_timeout: float | None = 600.0
    """Seconds without a step or a validation batch after which a rank logs the stacks of its threads and ends with
    exit code 75, so that torchrun starts the run again; unset leaves it to the collectives."""
    setup_timeout: float | None = 3600.0
    """The same for a start: seconds until data, weights and checkpoint are read and all ranks have met."""
    features_timeout: float | None = 600.0
    """The same for the feature cache: seconds without a round of images."""
    checkpoint_timeout: float | None = 600.0
    """The same for saving: seconds without a byte of a checkpoint."""
    export_timeout: float | None = 1800.0
    """The same for the export: seconds without a tensor."""

    def __post_init__(self) -> None:
        if self.spike_factor is not None and not (self.spike_factor > 1 and math.isfinite(self.spike_factor)):
            raise ConfigError(f"faults.spike_factor must be a finite number > 1, got {self.spike_factor}")
        for name in ("spike_window", "max_consecutive_skips"):
            if getattr(self, name) < 1:
                raise ConfigError(f"faults.{name} must be >= 1, got {getattr(self, name)}")
        for name, value in self.timeouts().items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"faults.{name} must be a finite number > 0 or unset, got {value}")

    def timeouts(self) -> dict[str, float | None]:
        """Setting -> seconds, for each section that the watchdog knows."""
        sections = ("hang", "setup", "features", "checkpoint", "export")
        return {f"{name}_timeout": getattr(self, f"{name}_timeout") for name in sections}


@dataclass(kw_only=True, frozen=True, slots=True)
class LoggingConfig:
    """Records of a run: OUTPUT/metrics.jsonl always, and experiment trackers (docs/integrations.md)."""

    interval: int = 10
    """Steps between records; the loss of a record is the mean over all labels of its steps."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where numbers, pictures, settings and environment also go: `tensorboard` (OUTPUT/tensorboard), `wandb`, `mlflow`;
    nothing after the flag, or [] in a file, stands for none."""
    project: str = "parrot_sys"
    """Project (wandb) or experiment (mlflow) that the run belongs to."""
    name: str | None = None
    """Name of the run there; that of the output directory when unset."""
    image_interval: int = 500
    """Steps between heat maps of the routes in training; one more follows the last step. Validations have one each."""
    samples: int = 0
    """Held-out records that are answered at each validation, for the trackers; not under sequence, context or
    interleaved pipeline parallelism."""
    sample_tokens: int = 64
    """Longest sample answer in tokens."""
    progress: bool = True
    """Show a progress bar on rank 0."""

    renamed: ClassVar[dict[str, str]] = {"tensorboard": "trackers: [tensorboard] for true, [] for false"}

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("image_interval", 1), ("samples", 0), ("sample_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"logging.{name} must be >= {least}, got {getattr(self, name)}")
        if self.samples > _MOST_SAMPLES:
            raise ConfigError(
                f"logging.samples must be <= {_MOST_SAMPLES}, all are answered at once, got {self.samples}"
            )
        if len(set(self.trackers)) < len(self.trackers):
            raise ConfigError(f"logging.trackers must name each tracker once, got {', '.join(self.trackers)}")
        if self.samples and not self.trackers:
            raise ConfigError(f"logging.samples needs logging.trackers, got {self.samples} samples and no tracker")


@dataclass(kw_only=True, frozen=True, slots=True)
class TrainConfig:
    """Trains Parrot: vision tower, projector, text-guided experts and decoder, together or in part."""

    output: Annotated[str, OUTPUT_FOLDER]
    """Directory of the run: config.yaml, metrics, checkpoints and the exported model."""
    model: ParrotConfig = field(default_factory=ParrotConfig)
    """Sizes and options of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Records, images and packing."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over the processes."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rates."""
    trainable: Annotated[dict[str, bool], BY_KEY] = field(default_factory=dict)
    """Part of the model -> whether it learns (`--trainable.no-llm`); frozen ones cost neither gradients nor optimizer
    state. `others` stands for the parts that are not named (`--trainable.lora --trainable.no-others`); without it they
    learn, but the vision tower does not."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Loss on held-out records."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving, resuming and initial weights."""
    faults: FaultConfig = field(default_factory=FaultConfig)
    """Steps that go wrong, processes that hang."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics and progress."""
    bypass: tuple[str, ...] = ()
    """Parts that are kept as they are, frozen, and passed by: `moe` sends projected rows to the decoder (Parrot's first
    stage), `textual_learners` adds the visual learners without router (that of Wings)."""
    global_batch_size: int = 128
    """Samples of a step over all ranks and micro-batches."""
    epochs: float = 1.0
    """Passes over the data, when `max_steps` is not set."""
    max_steps: int | None = None
    """Steps of the run, at the batch size that it began with: progress counts samples."""
    loss_reduction: Literal["global", "micro_batch"] = "global"
    """`global`: mean over all labels of the step; `micro_batch`: mean of the micro-batches' means (released code),
    which depends on the data-parallel size and on how samples are packed."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of parameters and activations; bf16 keeps fp32 main parameters and gradients in the optimizer."""
    recompute: Literal["none", "full"] = "none"
    """`full` computes the activations of each decoder layer again in the backward pass."""
    cache_image_features: bool = False
    """Run the frozen vision tower once over every image before training and keep its outputs on disk."""
    seed: int = 42
    """Seed of new weights and of everything random but the order of the data, which `data.seed` decides."""

    renamed: ClassVar[dict[str, str]] = {
        "use_moe": "bypass: [moe] for false, nothing for true",
        "use_router": "bypass: [textual_learners] for false, nothing for true",
    }

    def learning(self) -> dict[str, bool]:
        """Part of the model -> whether it learns; those that the model lacks or passes by do not."""
        return system_of(self.model).learning(self.model, self.trainable, self.bypass)

    def part_lrs(self) -> dict[str, float]:
        """Part that learns, or what lies in one -> its own peak learning rate, for those that have one."""
        learning, rated = self.learning(), system_of(self.model).rated
        return {
            name: lr for name, lr in self.optimizer.lrs.items() if learning[rated[name]] and lr != self.optimizer.lr
        }

    def __post_init__(self) -> None:
        if not self.output:
            raise ConfigError("output must name the directory of the run, got nothing: pass --output RUN_DIR")
        if not self.data.paths:
            raise ConfigError("data.paths must name at least one data set, got none")
        if self.model.tokenizer_path is None and self.checkpoint.load_from is None:
            raise ConfigError(
                "model.tokenizer_path must name a tokenizer's directory, or checkpoint.load_from a model, got neither"
            )
        if self.global_batch_size < 1:
            raise ConfigError(f"global_batch_size must be >= 1, got {self.global_batch_size}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps must be >= 1, got {self.max_steps}")
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ConfigError(f"epochs must be a finite number > 0, got {self.epochs}")
        if self.model.max_seq_len > (positions := self.model.llm.max_position_embeddings):
            raise ConfigError(
                f"model.max_seq_len must be <= model.llm.max_position_embeddings={positions}, "
                f"got {self.model.max_seq_len}"
            )
        self._check_parts()
        self._check_layout()
        if self.data.stream.enabled and self.max_steps is None:
            raise ConfigError("data.stream has no epochs, so max_steps must say how long the run is")
        if self.data.stream.enabled and self.cache_image_features:
            raise ConfigError("cache_image_features needs to know all pictures, which data.stream does not: unset one")
        self._check_samples()
        if self.cache_image_features and self.learning()["vision"]:
            raise ConfigError(
                "cache_image_features needs a frozen vision tower, got trainable.vision=true: "
                "set cache_image_features or trainable.vision to false"
            )

    def _check_parts(self) -> None:
        system = system_of(self.model)
        system.check_parts(self.trainable.keys() - {OTHERS}, "trainable")
        system.check_parts(self.optimizer.lrs, "optimizer.lrs", known=system.rated)
        system.check_bypass(self.bypass)
        present, learning = system.present_parts(self.model), self.learning()
        for name in self.optimizer.lrs:
            if learning[part := system.rated[name]]:
                continue
            if part not in present:
                why = f"because the model has none: set {system.parts[part].setting}, or unset it"
            elif part in self.bypass:
                why = f"because bypass names {part}: unset one of them"
            else:
                why = f"with trainable.{part}=false: unset it, or train that part"
            raise ConfigError(f"optimizer.lrs.{name} has no effect, {why}")
        if not any(learning.values()):
            asked = [part for part, learns in self.trainable.items() if learns and part != OTHERS]
            raise ConfigError(
                f"trainable must leave a part to learn, got none: those of this model are {', '.join(present)}"
                + (f", without those that bypass names ({', '.join(self.bypass)})" if self.bypass else "")
                + (f"; it lacks {', '.join(set(asked) - set(present))}" if set(asked) - set(present) else "")
            )

    def _check_samples(self) -> None:
        if not self.logging.samples:
            return
        if not self.validation.paths:
            raise ConfigError(
                "logging.samples needs validation.paths, whose records are answered, got none: set them, or samples 0"
            )
        for name in ("sequence_parallel", "context_parallel_size", "virtual_pipeline_model_parallel_size"):
            if (value := getattr(self.parallel, name)) not in (None, 1, False):
                raise ConfigError(f"logging.samples must be 0 with parallel.{name}={value}, got {self.logging.samples}")

    def _check_layout(self) -> None:
        parallel, experts = self.parallel, self.model.llm.experts
        parallel.layers_of_stages(self.model.llm.num_layers)
        for part, config in (("llm", self.model.llm), ("vision", self.model.vision)):
            self.parallel.check_tensor_sizes(f"model.{part}", config.tensor_sizes())
        moe, ranks = self.model.moe, (parallel.expert_model_parallel_size, parallel.expert_tensor_size)
        if moe.num_experts and experts is not None:
            self._check_both_experts(moe, experts, ranks)
        if moe.num_experts:
            check_experts(moe.num_experts, moe.ffn_hidden_size, *ranks)
        if experts is not None:
            check_experts(experts.num_experts, experts.ffn_hidden_size, *ranks, section="model.llm.experts")
            if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
                raise ConfigError(
                    "parallel.sequence_parallel must be true with tensor parallelism and model.llm.experts, got false: "
                    "all tensor-parallel ranks would send the same rows to the experts"
                )
        elif not moe.num_experts and ranks[0] != 1:
            raise ConfigError(
                "parallel.expert_model_parallel_size must be 1 without experts (model.moe.num_experts=0), "
                f"got {ranks[0]}"
            )

    @staticmethod
    def _check_both_experts(moe: TextGuidedMoEConfig, experts: TokenExpertsConfig, ranks: tuple[int, int]) -> None:
        """
        Raises:
            ConfigError: both kinds of experts, whose gradients Megatron sums over the same ranks, cannot be shared.
        """
        options = (("expert_model", "num_experts"), ("expert_tensor", "ffn_hidden_size"))
        for (option, name), size in zip(options, ranks, strict=True):
            first, second = getattr(moe, name), getattr(experts, name)
            if first % size or second % size:
                common = math.gcd(first, second)
                fits = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
                raise ConfigError(
                    f"parallel.{option}_parallel_size must divide both model.moe.{name}={first} and "
                    f"model.llm.experts.{name}={second}, because the same ranks share the experts of both kinds, "
                    f"got {size}: use one of {fits}"
                )
