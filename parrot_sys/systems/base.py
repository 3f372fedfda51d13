"""System: how one system differs from the others, and how Hugging Face files name it."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from parrot_sys.config_values import nearest
from parrot_sys.errors import ConfigError
from parrot_sys.files import Fields
from parrot_sys.models.llm import FAMILIES, DecoderFamily, LLMConfig, llm_fields
from parrot_sys.models.tensor_map import TensorMap
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.system_costs import SystemCosts
from parrot_sys.towers import VisionConfig

if TYPE_CHECKING:
    from parrot_sys.systems.bridge import SystemBridge


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a model that is frozen, and gets a learning rate of its own, by name."""

    description: str
    """For messages: "router and experts"."""
    marks: tuple[str, ...]
    """Its parameters are those whose names (in `MultimodalModel`) begin with one of these, or hold it after a dot."""
    setting: str | None = None
    """Setting without which the model lacks the part: a section of `model`, or a number in it."""
    learns: bool = True
    """Whether it learns unless a run says otherwise."""
    may_be_bypassed: bool = False
    """Whether a stage of training may pass it by and keep it as it is."""
    inner: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> marks of some of its parameters, which may have a learning rate of their own in `optimizer.lrs`."""

    def has(self, name: str) -> bool:
        """Whether a parameter of `MultimodalModel` belongs to the part, as `named_parameters` names it."""
        return is_marked(name, self.marks)


def is_marked(name: str, marks: Iterable[str]) -> bool:
    """Whether a parameter's name begins with one of the marks, or holds one that begins with a dot."""
    return any(name.startswith(mark) if mark[0] != "." else mark in name for mark in marks)


OTHERS = "others"
"""Stands for all parts that a run does not name, in the mapping of those that learn."""
_LORA = {"lora": Part(description="the low-rank updates", marks=(".lora.",), setting="model.lora")}
_OUTER = {
    "vision": Part(description="the vision tower", marks=("vision_tower.",), learns=False),
    "llm": Part(description="the decoder with embeddings, norms and LM head", marks=("decoder.",)),
}
PROJECTOR = {"projector": Part(description="the projector", marks=("projector.",))}
"""Of systems that put image rows into the text."""


class System(ABC):
    """One system: what it is called, what it consists of, how its released files look."""

    name: ClassVar[str]
    """In commands and folders."""
    title: ClassVar[str]
    """For people."""
    section: ClassVar[str | None]
    """Field of ParrotConfig that chooses it; None for the system of models without one."""
    own_parts: ClassVar[Mapping[str, Part]]
    """Name -> part, besides those of every system."""
    example: ClassVar[tuple[str, ...]]
    """Presets of a released size and of a stage of its training, for the help of commands."""
    template: ClassVar[str] = "chatml"
    """Format of conversations where a checkpoint names none."""
    select_feature: ClassVar[str] = "cls_patch"
    """Rows of the tower where config.json does not say."""
    tower_key: ClassVar[str] = "model.vision_tower.vision_tower.vision_model."
    """Before the names of the tower's tensors inside a checkpoint."""

    @property
    def parts(self) -> Mapping[str, Part]:
        """Name -> part, those that hold others before them."""
        return {**_OUTER, **self.own_parts, **_LORA}

    @property
    def rated(self) -> Mapping[str, str]:
        """Name that may have a learning rate of its own -> its part: all parts, and then what lies in them."""
        within = {inner: name for name, part in self.parts.items() for inner in part.inner}
        return {**{name: name for name in self.parts}, **within}

    def rate_of(self, name: str, rates: Collection[str]) -> str:
        """Name in `rates` (of `optimizer.lrs`) whose rate a parameter has, the innermost; "" for the common rate."""
        part = next((part for part in reversed(list(self.parts)) if self.parts[part].has(name)), "")
        if not part:
            return ""
        within = [inner for inner, marks in self.parts[part].inner.items() if inner in rates and is_marked(name, marks)]
        return within[-1] if within else part if part in rates else ""

    def present_parts(self, model: ParrotConfig) -> list[str]:
        """Names of the parts that a model of this configuration has."""
        return [
            name
            for name, part in self.parts.items()
            if part.setting is None or functools.reduce(getattr, part.setting.split(".")[1:], model)
        ]

    def learning(
        self, model: ParrotConfig, trainable: Mapping[str, bool], bypass: Collection[str] = ()
    ) -> dict[str, bool]:
        """Part -> whether it learns, as a run says or by default; parts that the model lacks or passes by do not.

        Args:
            model: configuration.
            trainable: part -> whether it is to learn; OTHERS for those that are not named.
            bypass: parts that are passed by.
        """
        present = set(self.present_parts(model)) - set(bypass)
        return {
            name: name in present and trainable.get(name, trainable.get(OTHERS, part.learns))
            for name, part in self.parts.items()
        }

    def check_parts(self, names: Iterable[str], where: str, known: Collection[str] | None = None) -> None:
        """Refuses names that are no parts of the system.

        Args:
            names: to be checked.
            where: setting that has them.
            known: names that there are; those of the parts when not given.

        Raises:
            ConfigError: names the parts, and the nearest.
        """
        known = self.parts if known is None else known
        for name in names:
            if name not in known:
                guess = nearest(name, list(known))
                raise ConfigError(
                    f"{where}.{name}: {self.title} has no such part; its parts are {', '.join(known)}"
                    + (f"; the nearest is {guess}" if guess else "")
                )

    def check_bypass(self, bypass: Collection[str]) -> None:
        """Refuses to pass by what cannot be passed by.

        Raises:
            ConfigError: names the parts that can.
        """
        allowed = [name for name, part in self.parts.items() if part.may_be_bypassed]
        if wrong := sorted(set(bypass) - set(allowed)):
            raise ConfigError(
                f"bypass must name parts of {self.title} that can be passed by ({', '.join(allowed) or 'none'}), "
                f"got {', '.join(wrong)}"
            )

    @abstractmethod
    def bridge(self) -> type[SystemBridge]:
        """Class of its bridge; imports Megatron."""

    @property
    @abstractmethod
    def model_types(self) -> Mapping[str, str]:
        """model_type of its released config.json -> architecture named there."""

    def family(self, model_type: str, fields: Fields, own: Fields) -> DecoderFamily:
        """Family of the decoder of a released checkpoint.

        Args:
            model_type: one of `model_types`, which ends with the family's name.
            fields: of config.json.
            own: those below `parrot_sys`.
        """
        return FAMILIES[model_type.removeprefix(f"{self.name}_")]

    def model_type(self, model: ParrotConfig) -> str:
        """model_type of a checkpoint of this model."""
        return f"{self.name}_{model.llm.family}"

    def decoder_fields(self, fields: Fields) -> Fields:
        """Fields of a released config.json that describe the decoder."""
        return fields

    def decoder_to_hf(self, llm: LLMConfig) -> dict[str, Any]:
        """Fields of a released config.json that describe the decoder."""
        return llm_fields(llm)

    @abstractmethod
    def from_hf(self, fields: Fields, llm: LLMConfig, vision: VisionConfig, directory: Path) -> dict[str, Any]:
        """Arguments of ParrotConfig besides the decoder, from a released config.json.

        Args:
            fields: of config.json.
            llm: the decoder.
            vision: the tower as its own files describe it.
            directory: of the checkpoint.
        """

    @abstractmethod
    def to_hf(self, model: ParrotConfig) -> dict[str, Any]:
        """Fields of a released config.json besides those of the decoder."""

    def bypass_fields(self, model: ParrotConfig, bypass: Collection[str]) -> dict[str, Any]:
        """Fields of a released config.json that say which parts are passed by."""
        return {}

    def with_bypassed_parts(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """A released config.json that says of no part that it is passed by."""
        return dict(hf)

    def unsure_sections(self, hf: Mapping[str, Any]) -> tuple[str, ...]:
        """Sections of ParrotConfig that a released config.json leaves open, because it passes their parts by."""
        return ()

    def new_fields(self) -> Mapping[str, Any]:
        """Further fields of a config.json that is not made from another one."""
        return {}

    @abstractmethod
    def maps(self, model: ParrotConfig) -> list[TensorMap]:
        """`MultimodalModel` <-> released names, without the vision tower."""

    def usual_name(self, key: str) -> str:
        """Name that `maps` have for a tensor of a checkpoint, which other programs may have named otherwise."""
        return key

    def costs(self) -> SystemCosts:
        """Costs of its parts besides tower and decoder."""
        return SystemCosts()

    def bypassed(self, names: Iterable[str]) -> frozenset[str]:
        """Parts that a checkpoint with these released tensors passes by, because an earlier stage wrote it."""
        return frozenset()

    def is_of_later_stage(self, key: str) -> bool:
        """Whether checkpoints of earlier stages lack a released tensor, together with all others of its kind."""
        return False

    def is_carried(self, key: str, model: ParrotConfig) -> bool:
        """Whether a released tensor may be there that the model does not use; export writes it back."""
        return False
