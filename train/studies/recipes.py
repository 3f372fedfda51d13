"""The steps that demos and experiments share: data, training stages, evaluation; and the small model of each system."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from parrot_sys import platform
from parrot_sys.cli import list_presets, parse_config
from parrot_sys.data.corpora.default.build import DataBuildConfig
from parrot_sys.errors import CheckpointError
from parrot_sys.files import save_tensors
from studies.pipeline import Pipeline, Step, commit

TRAIN_SCRIPT = Path(__file__).parents[2] / "train" / "train.py"
EXPERT_PREFIX = "model.moe_model."
"""Names of the experts' tensors in the released layout."""
_EXPERT_FIELDS = ("num_experts", "moe_hidden_size", "moe_intermediate_size", "use_moe_residual", "moe_weight")
"""Fields of config.json that describe them."""
BENCHMARK, DIALOGUES = "benchmark", "iit"
"""Folders of the data set with tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One training stage of a small model."""

    name: str
    title: str
    """In reports."""
    preset: str
    records: tuple[str, ...]
    """Files of the data set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One of the systems as a small model."""

    name: str
    title: str
    model: str
    """Preset of the model."""
    stages: tuple[Stage, ...]
    """The first one reads text alone."""
    routings: tuple[str, ...] = ("model",)
    """Routings that the demo evaluates, see `parrot eval --routing`."""


PRETRAIN = Stage(name="pretrain", title="0 text", preset="tiny_pretrain", records=("text.json",))
ALIGN = Stage(name="align", title="1 alignment", preset="tiny_align", records=("align.json",))
INSTRUCT = Stage(name="instruct", title="2 instruction", preset="tiny_instruct", records=("instruct.json",))
PARROT = System(
    name="parrot",
    title="Parrot",
    model="parrot_tiny_cpu",
    stages=(PRETRAIN, ALIGN, INSTRUCT),
    routings=("model", "off", "other-language"),
)
PLAIN = System(name="plain", title="Plain", model="plain_tiny_cpu", stages=(PRETRAIN, ALIGN, INSTRUCT))
"""The same model with a projector alone, which experiments compare with; no system of its own."""
WINGS = System(
    name="wings",
    title="Wings",
    model="wings_tiny_cpu",
    stages=(PRETRAIN, replace(ALIGN, preset="tiny_wings_align"), replace(INSTRUCT, preset="tiny_wings_instruct")),
)
MULTIMODAL_GPT = System(
    name="multimodal_gpt",
    title="MultiModal-GPT",
    model="multimodal_gpt_tiny_cpu",
    stages=(
        PRETRAIN,
        replace(ALIGN, preset="tiny_multimodal_gpt_align", records=("align.json", "instruct.json")),
        replace(INSTRUCT, preset="tiny_multimodal_gpt_instruct"),
    ),
)
LLAVA = System(
    name="llava",
    title="LLaVA",
    model="llava_tiny_cpu",
    stages=(PRETRAIN, replace(ALIGN, preset="tiny_llava_align"), INSTRUCT),
)
SYSTEMS: Mapping[str, System] = {system.name: system for system in (PARROT, WINGS, MULTIMODAL_GPT, LLAVA)}


QUICK_DATA = (
    "--concepts",
    "24",
    "--held-out",
    "8",
    "--text-rounds",
    "2",
    "--instruct-rounds",
    "2",
    "--align-rounds",
    "1",
)
QUICK_TRAIN = ("--max-steps", "4")
"""Settings of data and training that show in a few minutes that everything works."""


processes: int | None = None
"""Training processes that a user asked for."""


def num_processes() -> int:
    """Training processes: what was asked for, or one per GPU, or two on a CPU."""
    if processes is not None:
        return processes
    return torch.cuda.device_count() if platform.cuda_available() else 2


def build_data(pipeline: Pipeline, flags: Sequence[str] = (), *, name: str = "data") -> Step:
    """The default data set, with further settings of `parrot data build`."""

    def arguments(folder: Path) -> list[str]:
        return ["--output", str(folder), *flags]

    fingerprint = parse_config(DataBuildConfig, arguments(pipeline.root / name)).fingerprint()
    return pipeline.step(
        name,
        lambda folder: pipeline.command(_parrot("data", "build", *arguments(folder))),
        {"fingerprint": fingerprint},
    )


def train(
    pipeline: Pipeline,
    system: System,
    stage: Stage,
    data: Step,
    start: Step | None = None,
    *,
    name: str | None = None,
    flags: Sequence[str] = (),
    validate: bool = False,
) -> Step:
    """One stage under torchrun.

    Args:
        pipeline: where the step belongs.
        system: preset of the model.
        stage: preset and records.
        data: the data set.
        start: step whose model this one starts from; None starts with the decoder that the data set brings.
        name: of the step; that of the stage when not given.
        flags: further settings of `parrot train`.
        validate: also measure the loss on the validation records.
    """
    arguments = ["--config", system.model, "--config", stage.preset]
    arguments += ["--data.paths", *(str(data.folder / records) for records in stage.records)]
    arguments += ["--model.tokenizer-path", str(data.folder / "tokenizer")]
    if validate:
        arguments += ["--validation.paths", str(data.folder / "validation.json")]
    arguments += ["--checkpoint.load-from", str(data.folder / "decoder" if start is None else released(start))]
    # torchrun sets one thread itself where nothing is set, but not without a warning
    launcher = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "parrot_sys.launcher", "--standalone"]
    launcher += ["--nproc-per-node", str(num_processes())]

    def run(folder: Path) -> None:
        pipeline.command([*launcher, str(TRAIN_SCRIPT), *arguments, *flags, "--output", str(folder)])

    presets = {preset: list_presets()[preset].read_text(encoding="utf-8") for preset in (system.model, stage.preset)}
    settings = {"presets": presets, "arguments": arguments, "flags": list(flags)}
    return pipeline.step(name or stage.name, run, settings, [data, *([start] if start else [])])


def evaluate(
    pipeline: Pipeline,
    system: System,
    model: Step,
    data: Step,
    *,
    name: str = "evaluation",
    tables: str = BENCHMARK,
    mode: str = "text-likelihood",
    flags: Sequence[str] = (),
) -> Step:
    """All languages of the held-out questions.

    Args:
        pipeline: where the step belongs.
        system: names the model in files.
        model: step that trained it.
        data: the data set.
        name: of the step.
        tables: folder of the data set.
        mode: how answers are found, see `parrot eval --mode`.
        flags: further settings of `parrot eval`.
    """

    def run(folder: Path) -> None:
        arguments = ["--checkpoint", str(released(model)), "--data", str(data.folder / tables)]
        arguments += ["--name", f"{system.name}-tiny", "--mode", mode, "--max-new-tokens", "32"]
        pipeline.command(_parrot("eval", *arguments, "--output", str(folder), *flags))

    return pipeline.step(name, run, {"tables": tables, "mode": mode, "flags": list(flags)}, [model, data])


def evaluate_dialogues(pipeline: Pipeline, system: System, model: Step, data: Step, *, name: str, limit: int) -> Step:
    """The six types of dialogue, `limit` questions a type and language, options hidden."""
    flags = ["--options", "hidden", "--limit", str(limit)]
    return evaluate(pipeline, system, model, data, name=name, tables=DIALOGUES, flags=flags)


def measure_attention(pipeline: Pipeline, model: Step, data: Step, *, name: str, limit: int) -> Step:
    """Attention before and after the picture in the dialogues."""

    def run(folder: Path) -> None:
        arguments = ["--checkpoint", str(released(model)), "--data", str(data.folder / DIALOGUES)]
        arguments += ["--options", "hidden", "--limit", str(limit)]
        pipeline.command(_parrot("attention", *arguments, "--output", str(folder)))

    return pipeline.step(name, run, {"limit": limit}, [model, data])


def without_experts(pipeline: Pipeline, model: Step, *, name: str) -> Step:
    """The same model as a checkpoint without router and experts, bit-equal in everything else.

    A model with a plain projector can then start from exactly the weights that the model with experts starts from.
    """

    def run(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(released(model), released_folder(folder))
        strip_experts(released_folder(folder))

    return pipeline.step(name, run, after=[model])


def with_one_expert(pipeline: Pipeline, model: Step, *, name: str) -> Step:
    """The same model as a checkpoint whose experts are joined to a single one as wide as all of them.

    As many parameters that every image uses alike: at the start it computes what the experts do under uniform routes.
    """

    def run(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(released(model), released_folder(folder))
        join_experts(released_folder(folder))

    return pipeline.step(name, run, after=[model])


def bare_decoder(pipeline: Pipeline, model: Step, data: Step, *, name: str) -> Step:
    """The decoder of a model as a checkpoint of its own, laid out like the one that the data set brings.

    Models of any system can then start from the same decoder, bit for bit, their other parts from initial weights.
    """

    def run(folder: Path) -> None:
        target = released_folder(folder)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(data.folder / "decoder", target)
        trained = load_file(released(model) / "model.safetensors")
        held = load_file(target / "model.safetensors")
        save_tensors({key: trained[key] for key in held}, target / "model.safetensors")

    return pipeline.step(name, run, after=[model, data])


def strip_experts(folder: Path) -> None:
    """Removes router and experts from a checkpoint in the released layout.

    Raises:
        CheckpointError: its weights are not in one file, or hold no experts.
    """
    weights, config_path = folder / "model.safetensors", folder / "config.json"
    if not weights.is_file():
        raise CheckpointError(f"{folder} must hold its weights in model.safetensors to have its experts removed")
    tensors = load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(EXPERT_PREFIX)}
    if len(kept) == len(tensors):
        raise CheckpointError(f"{weights} holds no experts ({EXPERT_PREFIX}*)")
    save_tensors(kept, weights)
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for key in _EXPERT_FIELDS:  # a file that names experts and says use_moe false describes experts that are bypassed
        config.pop(key, None)
    config["use_moe"] = False
    config.get("parrot_sys", {}).pop("moe", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def join_experts(folder: Path) -> None:
    """Makes one expert of all those of a checkpoint in the released layout; its output is their mean."""
    weights, config_path = folder / "model.safetensors", folder / "config.json"
    config, tensors = json.loads(config_path.read_text(encoding="utf-8")), load_file(weights)
    count = config["num_experts"]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{EXPERT_PREFIX}experts.")}
    for layer, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        each = [tensors[f"{EXPERT_PREFIX}experts.{expert}.{layer}.weight"] for expert in range(count)]
        joined = torch.cat(each, dim) / (count if layer == "down_proj" else 1)
        kept[f"{EXPERT_PREFIX}experts.0.{layer}.weight"] = joined
    kept[f"{EXPERT_PREFIX}gate.weight"] = tensors[f"{EXPERT_PREFIX}gate.weight"][:1].clone()
    save_tensors(kept, weights)
    config |= {"num_experts": 1, "moe_intermediate_size": count * config["moe_intermediate_size"]}
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def released(step: Step) -> Path:
    """The model that a training step exported."""
    return released_folder(step.folder)


def released_folder(run: Path) -> Path:
    """Folder where a training run writes its model in the released layout."""
    return run / "hf"


def provenance() -> dict[str, Any]:
    """Machine, versions and commit, for results that are kept."""
    import platform as machine
    from importlib.metadata import version

    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        machine.processor(),
    )
    packages: Mapping[str, str] = {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    return {
        "device": torch.cuda.get_device_name() if platform.cuda_available() else f"{cpu}, {num_processes()} processes",
        "python": machine.python_version(),
        "versions": dict(packages),
        "commit": commit().removesuffix("+"),
        "clean": not commit().endswith("+"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def _parrot(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "parrot_sys", *arguments]
