"""The command `parrot plan`: what it prefers, refuses, prints and draws."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.__main__ import main
from parrot_sys.cli import list_presets
from parrot_sys.errors import ConfigError
from parrot_sys.megatron.config import to_transformer_config
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.models.llm import LLMConfig, TokenExpertsConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.parallel.image_dispatch import check_experts
from parrot_sys.planning.checks import check
from parrot_sys.planning.cluster import ClusterConfig
from parrot_sys.planning.config import FixConfig, PlanConfig, SampleConfig
from parrot_sys.planning.memory import activation_bytes, state_bytes
from parrot_sys.planning.report import explain
from parrot_sys.planning.search import NothingFits, choose, find_layouts
from parrot_sys.planning.weights import stage_weights
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.layout import Layout
from parrot_sys.systems.registry import SYSTEMS as SYSTEM_REGISTRY
from tests.planning.shapes import SYSTEMS

# Half of the layers of Parrot-7B: quick to search, still too large for one small GPU.
MODEL = ParrotConfig(llm=LLMConfig(num_layers=16))
NODE = ClusterConfig(gpu="A100-40GB", gpus_per_node=4)
BASE = PlanConfig(model=MODEL, cluster=NODE, global_batch_size=16)


def test_all_found_layouts_fit_and_the_fastest_is_first() -> None:
    found = find_layouts(BASE)
    assert len(found) > 10
    assert all(each.memory.total <= NODE.usable_bytes for each in found)
    times = [each.step_seconds for each in found]
    assert times == sorted(times)
    assert all(each.layout.num_gpus == 4 for each in found)
    assert all(0 < each.mfu < NODE.efficiency.gemm for each in found)


def test_the_best_is_the_simplest_of_the_equally_fast() -> None:
    found = find_layouts(BASE)
    best = choose(found)
    near = [each for each in found if each.step_seconds <= 1.01 * found[0].step_seconds]
    assert best in near
    assert best.layout.dimensions == min(each.layout.dimensions for each in near)


def test_what_is_fixed_stays() -> None:
    fix = FixConfig(tensor=2, pipeline=2, virtual=1, recompute="full", distributed_optimizer=False, samples=2)
    for each in find_layouts(replace(BASE, fix=fix)):
        layout = each.layout
        assert (layout.tensor, layout.pipeline, layout.virtual, layout.recompute) == (2, 2, 1, True)
        assert not layout.distributed_optimizer
        assert layout.samples == 2


def test_more_memory_never_makes_it_slower_and_less_frozen_costs_more() -> None:
    small, large = (find_layouts(replace(BASE, cluster=replace(NODE, memory_gb=gb)))[0] for gb in (38, 80))
    assert large.step_seconds <= small.step_seconds
    stage_one = replace(BASE, bypass=("moe",), trainable={"llm": False})
    assert find_layouts(stage_one)[0].step_seconds < large.step_seconds
    assert find_layouts(stage_one)[0].memory.optimizer < 1e9


def test_long_samples_bring_context_parallelism_into_play() -> None:
    long = replace(
        BASE,
        model=replace(MODEL, max_seq_len=32768),
        sample=SampleConfig(images=1, text_tokens=30000, label_tokens=1000),
        global_batch_size=4,
    )
    found = find_layouts(long)
    assert {each.layout.context for each in found} >= {1, 2}


def test_nothing_fits_says_what_would() -> None:
    with pytest.raises(NothingFits, match=r"no layout fits 4 x A100-40GB.*GB a GPU.*usable.*On \d+ GPUs .* fits"):
        find_layouts(
            replace(BASE, model=ParrotConfig(llm=LLMConfig(hidden_size=8192, num_layers=40, ffn_hidden_size=32768)))
        )


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=3), r"fix.tensor must divide llm.num_attention_heads=32, got 3: .* 2 and 4"),
        (Layout(pipeline=8, virtual=4), r"fix.pipeline x fix.virtual must be <= llm.num_layers=16, got 32"),
        (Layout(pipeline=3), r"tensor x context x pipeline = 3 must divide the 8 GPUs: .* 2 and 4"),
        (Layout(expert=4), r"fix.expert must divide moe.num_experts=6, got 4: .* 3 and 6"),
        (Layout(expert_tensor=3), r"fix.expert_tensor must divide moe.ffn_hidden_size=4096, got 3"),
        (Layout(context=3), r"tensor x context x pipeline = 3 must divide the 8 GPUs: .* 2 and 4"),
        (Layout(expert=3), r"expert x expert_tensor x pipeline = 3 must divide the 8 GPUs: .* 2 and 4"),
        (Layout(data=64), r"64 data-parallel ranks need as many samples a step, got global_batch_size=16: .*64"),
        (Layout(sequence=True), r"fix.sequence needs fix.tensor >= 2"),
    ],
)
def test_invalid_layouts_are_refused_with_the_nearest_values(layout: Layout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(MODEL, layout, 8, 16)


@pytest.mark.parametrize(
    ("fix", "message"),
    [
        (FixConfig(tensor=3), "fix.tensor must divide"),
        (FixConfig(expert=4), "nearest that do are 3 and 6"),
        (FixConfig(tensor=4, pipeline=4), "= 16 must divide the 4 GPUs: the nearest that do are 4"),
        (FixConfig(virtual=2, pipeline=1), "needs fix.pipeline >= 2"),
    ],
)
def test_fixed_sizes_that_cannot_run_are_refused(fix: FixConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_layouts(replace(BASE, fix=fix))


def test_experts_cannot_be_shared_where_there_are_none() -> None:
    plain = replace(MODEL, moe=TextGuidedMoEConfig(num_experts=0))
    with pytest.raises(ConfigError, match=r"fix\.expert must be 1 without experts"):
        check(plain, Layout(expert=2), 8, 16)


def test_low_rank_updates_alone_take_neither_gradients_nor_optimizer_state_of_the_decoder() -> None:
    whole = BASE.job()
    updates = replace(
        BASE, model=replace(BASE.model, lora=LoRAConfig(rank=8)), trainable={"lora": True, "others": False}
    ).job()
    layout = Layout(distributed_optimizer=True)
    weights = [stage_weights(job, layout, 0) for job in (whole, updates)]
    (parameters, gradients, optimizer), (more, few, little) = (
        state_bytes(job, layout, held, 0) for job, held in zip((whole, updates), weights, strict=True)
    )
    elements = sum(weight.total for weight in weights[1] if weight.component == "lora")
    # Two matrices of rank 8 beside each of the four projections of a layer's attention, all H wide.
    assert elements == 16 * 4 * 2 * 8 * 4096
    # bf16 parameters; gradients in float32; two moments and the main parameters.
    assert (few, little) == (4 * elements, 12 * elements)
    assert gradients > 500 * few
    assert optimizer > 500 * little
    assert more - 2 * elements == pytest.approx(parameters, rel=1e-6)
    batch = BASE.micro_batch(4)
    kept = [activation_bytes(job, layout, 0, batch) for job in (whole, updates)]
    assert kept[1] < 0.9 * kept[0]


RELEASED = {
    "parrot_7b": "parrot_instruct",
    "parrot_14b": "parrot_instruct",
    "parrot_32b": "parrot_instruct",
    "parrot_qwen2_7b": "parrot_align",
    "parrot_qwen3_8b": "lora_instruct",
    "parrot_qwen3_32b": "parrot_instruct",
    "parrot_qwen3_30b_a3b": "parrot_instruct",
    "wings_qwen1_5_7b": "wings_align",
    "wings_llama3_1_8b": "wings_instruct",
    "multimodal_gpt_9b": "multimodal_gpt_instruct",
    "llava_next_qwen3_8b": "llava_instruct",
}
"""Preset of every size that is no toy -> one of its stages."""


def test_every_preset_but_the_toys_is_planned() -> None:
    models = {path.stem for path in list_presets().values() if path.parent.name == "models"}
    assert {name for name in models if not name.endswith("_tiny_cpu")} == RELEASED.keys()


def test_help_names_a_model_and_a_stage_of_every_system(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for system in SYSTEM_REGISTRY.values():
        assert set(system.example) <= list_presets().keys()
        assert f"parrot plan {' '.join(f'--config {preset}' for preset in system.example)}" in printed


@pytest.mark.parametrize(("model", "stage"), RELEASED.items())
def test_presets_of_all_systems_are_planned(model: str, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["--fix.pipeline", "2", "--fix.virtual", "1", "--fix.samples", "1", "--fix.recompute", "full"]
    assert main(["plan", "--config", model, "--config", stage, "--cluster.nodes", "4", *fixed, "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    assert 0.05 < best["mfu"] < 0.6
    assert best["memory_bytes"]["total"] < 80e9


def test_samples_are_those_that_the_system_takes() -> None:
    two = SampleConfig(images=2)
    assert PlanConfig(model=SYSTEMS["Wings"], sample=two).micro_batch(3).images == 6
    with pytest.raises(ConfigError, match=r"sample.images must be <= 1 under the rule 'released' of model.wings"):
        PlanConfig(model=SYSTEMS["Wings, rule of the public code"], sample=two)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 400), images=st.integers(1, 3))
def test_rows_of_pictures_are_those_that_training_reads(height: int, width: int, images: int) -> None:
    model = SYSTEMS["LLaVA with tiles"]
    sample = SampleConfig(images=images, picture_height=height, picture_width=width)
    batch = PlanConfig(model=model, sample=sample).micro_batch(2)
    assert model.tiling is not None
    rows = model.tiling.rows(height, width)
    assert batch.images == 2 * images * rows.tiles
    assert batch.visual_rows == batch.rows - 2 * sample.text_tokens == 2 * images * len(rows.source)


def test_ranks_share_both_kinds_of_experts() -> None:
    model = replace(MODEL, llm=SYSTEMS["token-routed decoder, four dense experts"].llm)
    assert check(model, Layout(expert=3), 12, 100) is None
    words = r"fix.expert must divide moe.num_experts=6 and llm.experts.num_experts=9 \(the same ranks share the experts"
    nine = replace(model, llm=replace(model.llm, experts=TokenExpertsConfig(num_experts=9)))
    with pytest.raises(ConfigError, match=words + r" of both kinds\), got 2: the nearest that do are 1 and 3"):
        check(nine, Layout(expert=2), 12, 100)
    with pytest.raises(ConfigError, match=r"fix.sequence must be true with tensor parallelism and model.llm.experts"):
        check(model, Layout(tensor=2), 12, 100)


SIZES = {
    "tensor": (1, 2, 3, 4, 5, 8),
    "pipeline": (1, 2, 3),
    "virtual": (1, 2, 9),
    "context": (1, 2),
    "expert": (1, 2, 4, 6),
    "expert_tensor": (1, 2, 3),
}


def test_what_the_trainer_refuses_is_refused_and_nothing_else() -> None:
    refused = 0
    for sizes in itertools.product(*SIZES.values()):
        layout = Layout(**dict(zip(SIZES, sizes, strict=True)))
        error = _trainers_error(layout, 12)
        refused += error is not None
        assert (_refusal(MODEL, layout, 12) is None) == (error is None), (layout, error)
    assert 0 < refused < math.prod(map(len, SIZES.values()))


def _refusal(model: ParrotConfig, layout: Layout, num_gpus: int) -> str | None:
    try:
        check(model, layout, num_gpus, samples_per_step=1000)
    except ConfigError as error:
        return str(error)
    return None


def _trainers_error(layout: Layout, num_gpus: int) -> str | None:
    """What `parrot train` says before it builds anything, and what the modules say when they are cut."""
    try:
        parallel = layout.parallel
        parallel.data_parallel_size(num_gpus)
        parallel.layers_of_stages(MODEL.llm.num_layers)
        to_transformer_config(MODEL.llm, parallel, dtype=torch.bfloat16, initialize_weights=False)
        check_experts(MODEL.moe.num_experts, MODEL.moe.ffn_hidden_size, layout.expert, layout.expert_tensor)
        if MODEL.vision.num_attention_heads % layout.tensor or MODEL.llm.hidden_size % layout.tensor:
            raise ConfigError("tower and projector are cut too")
    except (ConfigError, ValueError, AssertionError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("layout", "field"), [(Layout(expert=4), "expert"), (Layout(expert_tensor=3), "expert_tensor")]
)
def test_nearest_sizes_for_experts_are_those_of_the_trainer(layout: Layout, field: str) -> None:
    error, refusal = _trainers_error(layout, 12), _refusal(MODEL, layout, 12)
    assert error is not None
    assert refusal is not None
    suggested = error.rsplit(" to ", 1)[1]
    assert f" {suggested}" in refusal.split("the nearest")[1]
    assert _trainers_error(replace(layout, **{field: int(suggested)}), 12) is None


@pytest.mark.parametrize(
    "layout", [Layout(expert=2), Layout(tensor=2, expert=2), Layout(tensor=2, expert_tensor=2), Layout(expert_tensor=2)]
)
def test_printed_options_give_the_layout(layout: Layout) -> None:
    options = [option for option in layout.flags(rows=1) if option.startswith("--parallel.")]
    parsed = {name.removeprefix("--parallel.").replace("-", "_"): value for name, value in map(str.split, options)}
    parallel = ParallelConfig(**{name: int(value) for name, value in parsed.items()})
    assert parallel.expert_tensor_size == layout.expert_tensor
    assert parallel.expert_model_parallel_size == layout.expert
    assert parallel.tensor_model_parallel_size == layout.tensor


def test_words_name_what_the_simpler_layouts_lack() -> None:
    best = choose(find_layouts(BASE))
    text = explain(BASE, best)
    assert f"{best.memory.total / 1e9:.1f} of" in text
    assert "which does not fit" in text
    assert "--data.max-tokens-per-micro-batch" in text
    assert "not measured" in text


ARGUMENTS = ["plan", "--config", "parrot_7b", "--config", "parrot_instruct", "--cluster.gpu", "H200"]
FEW = ["--fix.tensor", "1", "--fix.pipeline", "1", "--fix.expert", "1", "--top", "2"]


def test_command_prints_a_table_and_takes_the_files_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, *FEW]) == 0
    out = capsys.readouterr().out
    assert "recompute  rows x micro-batches  GB/GPU  s/step" in out
    assert "* Best on 8 x H200 (1 x 8): DP8, with ZeRO-1" in out
    assert "Predicted by formulas" in out


def test_command_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "plan.svg"
    assert main([*ARGUMENTS, *FEW, "--json", "--plot", str(figure)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["layouts"]) == 2
    first = printed["layouts"][0]
    assert first["memory_bytes"]["total"] == pytest.approx(
        sum(value for name, value in first["memory_bytes"].items() if name != "total")
    )
    assert "not measured" in printed["note"]
    assert printed["assumptions"]["gpu"]["source"].startswith("NVIDIA H200")
    text = figure.read_text()
    assert "GB a GPU" in text
    assert "predicted" in text


def test_command_scales_and_says_where_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "scaling.svg"
    options = ["--scaling.gpus", "1", "8", "16", "--scaling.samples-per-gpu", "4", "--plot", str(figure)]
    assert main([*ARGUMENTS, *FEW, *options]) == 0
    out = capsys.readouterr().out
    assert "| 8 | DP8 | yes |" in out
    assert "| 16 | DP16 | yes |" in out
    assert "no layout fits 1 x H200" in out
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster.gpu", "H20"], "did you mean H200"),
        (["--sample.text-tokens", "4000"], "raise model.max_seq_len"),
        (["--plot", "plan.txt"], ".svg, .png or .pdf"),
        (["--scaling.gpus", "12"], "nearest are 8 and 16"),
        (["--model.moe.num-experts", "0", "--fix.tensor", "5"], "nearest that do are 4 and 8"),
    ],
)
def test_command_refuses_what_cannot_be(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--config", "parrot_7b", *options])
    assert stopped.value.code == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in printed


def test_unknown_settings_of_files_are_still_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("optimizer: {lr: 1.0e-3}\nmodel: {moe: {num_expert: 4}}\n")
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(path)])
    assert "the nearest is model.moe.num_experts" in capsys.readouterr().err


def test_experts_of_which_few_work_cost_little_time() -> None:
    many = replace(MODEL, moe=TextGuidedMoEConfig(num_experts=64, routing="topk", topk=2))
    roomy = replace(BASE, cluster=replace(NODE, memory_gb=1000), fix=FixConfig(tensor=1, pipeline=1, expert=1))
    few = find_layouts(roomy)[0]
    found = find_layouts(replace(roomy, model=many))[0]
    assert found.seconds["experts"] < few.seconds["experts"]
    assert found.memory.parameters > 1.5 * few.memory.parameters
