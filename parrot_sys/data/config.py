"""DataConfig: which data sets, in which mix, packed and checked how."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from parrot_sys.data.decoding import Exif, ImageLimits, Transparency
from parrot_sys.data.languages import canonical_keys
from parrot_sys.data.mix_config import Mix, MixStage, check_curriculum, check_mix
from parrot_sys.data.parts import ControlTokens, ImagePosition
from parrot_sys.data.record_files import LINE_SUFFIXES
from parrot_sys.data.remote.config import RemoteConfig
from parrot_sys.data.remote.copies import copy_records, place_of_copy
from parrot_sys.data.remote.storage import RemoteStorage, is_remote
from parrot_sys.data.stream.config import StreamConfig
from parrot_sys.errors import ConfigError
from parrot_sys.paths import INPUT, OUTPUT_FOLDER

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """One data set of the mix, with every default filled in."""

    path: Path
    """Where it is on this machine; of a remote one, where its copy is."""
    image_root: str | Path
    name: str
    language: str
    weight: float
    address: str = ""
    """Of a remote data set."""

    def fetch(self, storage: RemoteStorage) -> None:
        """Copies a remote data set to this machine, as far as it is not here yet.

        Raises:
            DataError: there is none.
            StorageError: the storage does not answer.
        """
        if self.address:
            copy_records(self.address, self.path, storage)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Lists hold one value for each of `paths`, or none for the default; all but `names` may hold one value for all."""

    paths: Annotated[tuple[str, ...], INPUT] = ()
    """Data sets: JSON lists, JSON lines, Parquet or Arrow files, Hugging Face data sets, WebDataset shards or energon
    folders; records in LLaVA/Parrot format or another one of docs/data.md."""
    image_roots: Annotated[tuple[str, ...], INPUT] = ()
    """Base of the records' image names (default: the directory of each data set): a directory, a tar or
    Parquet file, a directory of those, a pattern such as 'shards/*.tar', or an address of one of these that fsspec
    opens (s3://, gs://, https://)."""
    allow_outside_root: bool = False
    """Also read images whose names lead out of the image root: absolute names, `..`, symbolic links. Only for records
    that you trust: without it such a record is a bad one."""
    exif: Exif = "apply"
    """`apply` turns pictures as their EXIF orientation says, as every viewer does; `ignore` leaves them as they are
    stored (released code). Saved with the model, so that evaluation and chat do the same."""
    transparency: Transparency = "white"
    """Colour of transparent pixels: `white` or `black` paper, or (`drop`, released code) the colour that the file has
    below them, mostly black. Saved with the model."""
    image_limits: ImageLimits = field(default_factory=ImageLimits)
    """Largest pictures; one over a limit is a bad sample."""
    names: tuple[str, ...] = ()
    """Names of the data sets in logs and record ids (default: file name without its ending)."""
    languages: tuple[str, ...] = ()
    """Languages of the records that state none in `lang` (default: unknown)."""
    weights: tuple[float, ...] = ()
    """How often an epoch takes each record of a data set; 0.25 takes another random quarter each epoch (default: 1)."""
    language_weights: dict[str, float] = field(default_factory=dict)
    """The same for the records of a language, or of a language in one data set (SET/LANGUAGE), multiplied with
    `weights` (default of a language: 1)."""
    language_alpha: float | None = None
    """Temperature sampling: an epoch has each language in proportion to its size (with weights) to this power, at the
    same length; 0 gives all languages the same share (default: 1, as the weights say)."""
    caps: dict[str, int] = field(default_factory=dict)
    """Data set -> most samples that an epoch takes of it."""
    language_caps: dict[str, int] = field(default_factory=dict)
    """Language -> most samples that an epoch takes of it."""
    curriculum: tuple[MixStage, ...] = ()
    """Other mixes from given steps on (in a YAML file)."""
    text_ratio: float | None = None
    """Samples without an image for each one with an image, in every step; an epoch then is one of the samples with
    images, and those without are repeated or drawn as it takes (default: an epoch of all; as the records come)."""
    max_tokens_per_micro_batch: int | None = None
    """Most rows (text and image) in one packed micro-batch; the longest sample allowed when not set."""
    seed: int = 42
    """Seed of the order of samples; the order depends on it, the epoch and the mix only."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """A wrong record, one without a label (its answers are cut away), a missing or a broken image: stop, or leave the
    record out, count it and name it in the log."""
    on_long_sample: Literal["truncate", "error", "skip"] = "truncate"
    """A sample longer than the model's max_seq_len rows: cut it as the released code does, stop, or leave it out."""
    image_position: ImagePosition = "in_place"
    """Position of the images of a turn: `in_place` leaves them between the words where the record has them, `front`
    moves them to the start of their turn, as the released code does, and says so once for each data set."""
    control_tokens: ControlTokens = "text"
    """Reading of a control token's name in a record's text, such as <|im_end|> or </s>: `text` like any other, or
    `parsed` to be the token, as in the released code; ordinary text has the same ids either way."""
    index_dir: Annotated[str | None, OUTPUT_FOLDER] = None
    """Directory of the data sets' indexes, as `parrot data index --output` makes them (default: `cache_dir`, or
    OUTPUT/index of a training run). An index that is missing is built there; one of another tokenizer or template is
    refused."""
    cache_dir: Annotated[str | None, OUTPUT_FOLDER] = None
    """Directory that keeps indexes of the data sets, one for each tokenizer and template, image features
    (`cache_image_features`; default: OUTPUT/features), and indexes of image archives whose own directory cannot be
    written."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """How files behind an address (`s3://bucket/...`) are read."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """Training from data sets that cannot be indexed first."""
    num_workers: int = 2
    """Threads that decode images."""
    prefetch_steps: int = 2
    """Steps prepared ahead while the model works."""

    def __post_init__(self) -> None:
        for name in ("image_roots", "names", "languages", "weights"):
            if (count := len(getattr(self, name))) not in (
                (0, len(self.paths)) if name == "names" else (0, 1, len(self.paths))
            ):
                raise ConfigError(
                    f"data.{name} must hold one value for each of the {len(self.paths)} data.paths, got {count}"
                )
        self.stream.check(self)
        check_mix(self, "data.", len(self.paths))
        check_curriculum(self.curriculum, len(self.paths))
        if self.text_ratio is not None and not (self.text_ratio > 0 and math.isfinite(self.text_ratio)):
            raise ConfigError(
                f"data.text_ratio must be a finite number > 0 or unset, got {self.text_ratio}; to leave a set out, "
                "give it a weight of 0"
            )
        if self.text_ratio is not None and any(mix.caps or mix.language_caps for _, mix in self.mixes()):
            raise ConfigError("data.caps and data.language_caps limit no set that data.text_ratio repeats: unset one")
        for name, least in (("num_workers", 1), ("prefetch_steps", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"data.{name} must be >= {least}, got {value}")
        if self.max_tokens_per_micro_batch is not None and self.max_tokens_per_micro_batch < 1:
            raise ConfigError(f"data.max_tokens_per_micro_batch must be >= 1, got {self.max_tokens_per_micro_batch}")
        names = [source.name for source in self.sources()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"data.names must differ, got {twice[0]!r} more than once; name the data sets in data.names"
            )

    def sources(self) -> tuple[DataSource, ...]:
        """The data sets with their settings."""
        paths = [place_of_copy(path, self.cache_dir) if is_remote(path) else Path(path) for path in self.paths]
        chosen: tuple[str | Path, ...] = tuple(root if is_remote(root) else Path(root) for root in self.image_roots)
        beside = [_folder_of(given, path) for given, path in zip(self.paths, paths, strict=True)]
        roots = _spread(chosen, beside)
        names = self.names or tuple(path.stem for path in paths)
        languages = _spread(self.languages, [""] * len(paths))
        weights = _spread(self.weights, [1.0] * len(paths))
        return tuple(
            DataSource(
                path=path,
                image_root=root,
                name=name,
                language=language,
                weight=weight,
                address=given if is_remote(given) else "",
            )
            for given, path, root, name, language, weight in zip(
                self.paths, paths, roots, names, languages, weights, strict=True
            )
        )

    def mixes(self) -> tuple[tuple[int, Mix], ...]:
        """The first step and the mix of each stage, the first of which begins at 0."""
        names = [source.name for source in self.sources()]
        stages = []
        for stage in (MixStage(from_step=0), *self.curriculum):

            def setting(name: str, stage: MixStage = stage) -> Any:
                return getattr(self if getattr(stage, name) is None else stage, name)

            alpha = setting("language_alpha")
            mix = Mix(
                weights=dict(zip(names, _spread(setting("weights"), [1.0] * len(names)), strict=True)),
                language_weights=canonical_keys(setting("language_weights")),
                alpha=1.0 if alpha is None else alpha,
                caps=setting("caps"),
                language_caps=canonical_keys(setting("language_caps")),
            )
            stages.append((stage.from_step, mix))
        return tuple(stages)


def _folder_of(given: str, path: Path) -> str | Path:
    """The folder of a data set; of remote JSON, which is copied without its pictures, the remote one."""
    if is_remote(given) and given.lower().endswith((".json", *LINE_SUFFIXES)):
        return given.rsplit("/", 1)[0]
    is_folder = path.is_dir() or (is_remote(given) and not path.suffix)  # (its copy may not be here yet)
    return path if is_folder else path.parent


def _spread(values: tuple[T, ...], default: list[T]) -> list[T]:
    """One value for each data set: as given, the one value for all, or the default."""
    if not values:
        return default
    return list(values) if len(values) == len(default) else [values[0]] * len(default)
