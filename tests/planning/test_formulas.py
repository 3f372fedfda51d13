"""The parts of the model of a training step, each against something that was counted another way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.cli import list_presets
from parrot_sys.config_values import config_from_dict, read_yaml
from parrot_sys.megatron.runtime.initialize import initialize, shutdown
from parrot_sys.planning.cluster import GPUS, ClusterConfig, Efficiency
from parrot_sys.planning.compute import model_flops
from parrot_sys.planning.config import PlanConfig, SampleConfig
from parrot_sys.planning.estimate import estimate, micro_batches, peak_memory
from parrot_sys.planning.schedule import peak_in_flight
from parrot_sys.planning.weights import buffer_elements, stage_weights
from parrot_sys.systems.balance import expected_imbalance, ranks_of_choices
from parrot_sys.systems.build import build_model
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.cost import Message
from parrot_sys.systems.flops import FlopCounter
from parrot_sys.systems.job import make_job
from parrot_sys.systems.layout import Layout
from parrot_sys.systems.parts import part_parameters
from parrot_sys.systems.registry import system_of
from parrot_sys.systems.system_costs import Job
from tests.planning.runs import make_batch, sizes
from tests.planning.shapes import SHAPES, SYSTEMS

MODELS = [
    "parrot_7b",
    "parrot_14b",
    "parrot_32b",
    "parrot_qwen2_7b",
    "parrot_qwen3_8b",
    "parrot_qwen3_32b",
    "parrot_qwen3_30b_a3b",
    "parrot_tiny_cpu",
    "wings_qwen1_5_7b",
    "wings_llama3_1_8b",
    "wings_tiny_cpu",
    "multimodal_gpt_9b",
    "multimodal_gpt_tiny_cpu",
    "llava_next_qwen3_8b",
    "llava_tiny_cpu",
]


def _preset(name: str) -> ParrotConfig:
    return config_from_dict(ParrotConfig, read_yaml(list_presets()[name])["model"])


def _job(config: ParrotConfig) -> Job:
    return make_job(config, system_of(config).learning(config, {}))


@pytest.fixture
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


@pytest.mark.usefixtures("_groups")
@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_the_presets_are_those_of_the_built_model(name: str) -> None:
    config = _preset(name)
    model = build_model(config, device="meta", dtype=torch.bfloat16)
    weights = stage_weights(_job(config), Layout(), 0)
    for component, parameters in part_parameters(model).items():
        predicted = sum(weight.total for weight in weights if weight.component == component)
        assert predicted == sum(parameter.numel() for parameter in parameters), component
    assert buffer_elements(config.vision) == sum(buffer.numel() for buffer in model.buffers())


@pytest.mark.parametrize("layout", [Layout(pipeline=4, data=2), Layout(tensor=2, pipeline=2, expert_tensor=2)])
def test_stages_and_cuts_hold_the_whole_model_together(layout: Layout) -> None:
    job = _job(_preset("parrot_7b"))
    whole = sum(weight.total for weight in stage_weights(job, Layout(), 0))
    ranks = [weight for stage in range(layout.pipeline) for weight in stage_weights(job, layout, stage)]
    # Cut matrices count once for each tensor-parallel rank, the others once.
    held = layout.tensor * sum(weight.total for weight in ranks)
    extra = held - whole
    assert 0 <= extra <= (layout.tensor - 1) * 0.01 * whole


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_model_flops_are_those_the_trainer_counts(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from([*SHAPES.values(), *SYSTEMS.values()]))
    system, answer = system_of(config), data.draw(st.integers(1, 30))
    trainable = {name: data.draw(st.booleans()) for name in system.present_parts(config)}
    parts = [name for name, part in system.parts.items() if part.may_be_bypassed]
    bypass = data.draw(st.sets(st.sampled_from(parts))) if parts else set()
    learning = system.learning(config, trainable, bypass)
    images, samples = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))
    batch = make_batch(config, samples=samples, answer=answer, images=images)
    counted = FlopCounter(config, learning, bypass=bypass).count(batch)
    job = make_job(config, learning, bypass=bypass)
    assert model_flops(job, sizes(batch)) == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize(("ranks", "choices"), [(2, 24), (3, 24), (6, 4), (6, 24), (6, 192), (8, 4000), (64, 512)])
def test_expected_imbalance_is_that_of_drawn_routes(ranks: int, choices: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, ranks, (4000, choices), generator=generator)
    loads = torch.zeros(4000, ranks).scatter_add_(1, draws, torch.ones(draws.shape))
    drawn = loads.amax(1).mean().item() * ranks / choices
    # The Poisson limit is worst where a handful of images meets a handful of ranks.
    assert expected_imbalance(ranks, choices) == pytest.approx(drawn, rel=0.1 if choices < 10 else 0.02)


@pytest.mark.parametrize(("experts", "ranks", "topk"), [(4, 2, 1), (4, 2, 2), (6, 3, 2), (64, 8, 2), (8, 2, 5)])
def test_ranks_that_an_image_goes_to_are_those_of_drawn_routes(experts: int, ranks: int, topk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(20_000, experts, generator=generator).argsort(1)[:, :topk]
    seen = torch.zeros(len(draws), ranks).scatter_(1, draws // (experts // ranks), 1.0)
    # Three standard deviations of the mean of so many draws of a number between 1 and topk.
    assert ranks_of_choices(experts, ranks, topk) == pytest.approx(
        seen.sum(1).mean().item(), abs=1.5 * topk / 20_000**0.5
    )


def test_imbalance_of_very_many_choices_goes_on_smoothly() -> None:
    below, above = expected_imbalance(8, 8 * 700), expected_imbalance(8, 8 * 800)
    assert 1 < above < below * 1.03 < 1.12
    assert expected_imbalance(1, 100) == 1.0


def test_pipeline_bubble_of_equal_stages_is_that_of_the_paper() -> None:
    # Text only and with hardly any head or embedding work: all stages take the same time.
    base = _preset("parrot_7b")
    model = dataclasses.replace(
        base,
        vision=dataclasses.replace(base.vision, select_layer=0, patch_size=168, image_size=168),
        moe=dataclasses.replace(base.moe, num_experts=0),
    )
    free = Efficiency(latency_us=0.0, link=1.0)
    cluster = ClusterConfig(nodes=1, gpus_per_node=4, node_gb_s=1e9, network_gb_s=1e9, efficiency=free)
    config = PlanConfig(
        model=model,
        cluster=cluster,
        sample=SampleConfig(images=0, text_tokens=1024, label_tokens=0),
        global_batch_size=8,
    )
    job = config.job()
    for virtual in (1, 2):
        layout = Layout(pipeline=4, virtual=virtual)
        found = estimate(config, job, layout, peak_memory(config, job, layout))
        work = found.step_seconds - found.seconds["pipeline bubble"] - found.seconds["optimizer"]
        assert found.num_micro_batches == 8
        assert found.seconds["pipeline bubble"] / work == pytest.approx(3 / (virtual * 8), rel=1e-3)


def test_micro_batches_in_flight_are_those_of_the_schedules() -> None:
    assert [peak_in_flight([1.0], 4, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert peak_in_flight([1.0], 4, 0, 2) == 2
    # Narayanan et al.: 1 + (p - 1) / (p v) times the activations of a whole model on the first of p stages.
    pipeline, virtual = 4, 2
    most = peak_in_flight([1 / virtual / pipeline] * virtual, pipeline, 0, 64)
    assert most == pytest.approx(1 + (pipeline - 1) / (pipeline * virtual))
    # Two chunks on the last of two ranks: after the warm-up (1 1 2) the first chunk runs ahead of the second.
    assert peak_in_flight([1.0, 0.0], 2, 1, 8) == 3


def test_micro_batches_are_dealt_evenly() -> None:
    assert micro_batches(Layout(data=4, samples=8), 100) == (4, 6.25, 7)
    assert micro_batches(Layout(data=4, samples=8, pipeline=3, virtual=2), 100) == (6, 25 / 6, 5)


def test_links_within_and_between_nodes() -> None:
    cluster = ClusterConfig(gpu="H100", nodes=4, efficiency=Efficiency(link=1.0))
    sheet = GPUS["H100"]
    assert cluster.link_bytes_per_second(8, 1) == sheet.node_gb_s * 1e9
    # 16 neighbours: eight of each node share the network; 4 ranks of different nodes have one adapter each.
    assert cluster.link_bytes_per_second(16, 1) == min(sheet.node_gb_s, 8 * sheet.network_gb_s) * 1e9
    assert cluster.link_bytes_per_second(4, 8) == sheet.network_gb_s * 1e9


def test_bytes_sent_by_rings() -> None:
    for operation, share in (("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75), ("send", 1.0)):
        message = Message(dimension="tensor", operation=operation, payload=100.0, calls=1, size=4)
        assert message.sent == 100 * share
    assert math.isclose(ClusterConfig().collective_seconds(1e9, 1, 1), 0.0)
