"""Router and experts inside Megatron's MoELayer, against TopKRouter and SequentialMLP on the same layout and on one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from parrot_sys.errors import ConfigError
from parrot_sys.megatron import GroupedExperts, TokenRouter, moe_layer_spec, with_grouped_experts
from parrot_sys.megatron.runtime.compat import moe_submodules
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.testing.distributed import run_distributed
from tests.megatron import gpt_training as gpt

AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01}
DEEPSEEK = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_shared_expert_intermediate_size": 8,
}
PRE_SOFTMAX = {
    "moe_router_pre_softmax": True,
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.05],
    "moe_router_topk": 3,
    "moe_router_dtype": "fp64",
}
SETTINGS = {"aux": AUX, "deepseek": DEEPSEEK, "pre-softmax": PRE_SOFTMAX}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each setting, a checkpoint of Megatron's own model with random weights, written by one process."""
    folders = {}
    initialize()
    for name, moe in SETTINGS.items():
        torch.manual_seed(5)
        folders[name] = tmp_path_factory.mktemp(name)
        gpt.save(gpt.build(gpt.make_config(ParallelConfig(), **moe), ours=False), folders[name])
    shutdown()
    return folders


@pytest.fixture(scope="module")
def one_process(start: dict[str, Path]) -> dict[str, gpt.Run]:
    """Megatron's own model on one process."""
    runs = {}
    for name, moe in SETTINGS.items():
        arguments = (ParallelConfig(), start[name], _with_dispatcher(moe))
        (peer, ours), *_ = run_distributed(gpt.on_ranks, 1, *arguments, timeout=120)
        _assert_same(peer, [peer], [ours], 1e-6)
        runs[name] = peer
    return runs


def _with_dispatcher(moe: dict[str, Any], kind: str = "allgather") -> dict[str, Any]:
    return {**moe, "moe_token_dispatcher_type": kind}


def _assert_same(reference: gpt.Run, wanted: list[gpt.Run], got: list[gpt.Run], tolerance: float) -> None:
    """Losses of three steps, all gradients, and on one layout choices and expert bias."""
    for run in got:
        np.testing.assert_allclose(run.losses, reference.losses, rtol=tolerance, equal_nan=False)
    theirs, ours = gpt.assemble(wanted), gpt.assemble(got)
    assert theirs.keys() == ours.keys()
    floor = 1e-3 * max(abs(gradient).max() for gradient in theirs.values())
    for key, gradient in theirs.items():
        assert abs(ours[key] - gradient).max() <= tolerance * max(abs(gradient).max(), floor), key
    for a, b in zip(wanted, got, strict=len(wanted) == len(got)):
        if len(wanted) == len(got):
            assert np.array_equal(a.chosen, b.chosen)
        for layer in a.expert_bias.keys() & b.expert_bias.keys():
            assert np.array_equal(a.expert_bias[layer], b.expert_bias[layer])
            assert abs(a.expert_bias[layer]).max() > 0


@pytest.mark.parametrize(
    ("layout", "setting", "dispatcher"),
    [
        pytest.param("ep2", "aux", "allgather", marks=pytest.mark.slow),
        ("ep2", "deepseek", "alltoall"),
        pytest.param("tp2-etp2", "deepseek", "alltoall", marks=pytest.mark.slow),
        pytest.param("tp2-ep2", "pre-softmax", "allgather", marks=pytest.mark.slow),
        ("tp2-ep2", "deepseek", "alltoall"),
        ("ep4", "pre-softmax", "alltoall"),
        pytest.param("ep2-dp2", "deepseek", "allgather", marks=pytest.mark.slow),
        pytest.param("tp2-ep2-etp2", "aux", "alltoall", marks=pytest.mark.slow),
        ("tp2-ep2-etp2", "deepseek", "allgather"),
        pytest.param("pp2", "deepseek", "alltoall", marks=pytest.mark.slow),
        ("pp2-ep2", "deepseek", "allgather"),
    ],
)
def test_layouts_equal_megatrons_experts_and_one_process(
    layout: str, setting: str, dispatcher: str, start: dict[str, Path], one_process: dict[str, gpt.Run]
) -> None:
    world_size, parallel = gpt.LAYOUTS[layout]
    moe = _with_dispatcher(SETTINGS[setting], dispatcher)
    pairs = run_distributed(gpt.on_ranks, world_size, parallel, start[setting], moe, timeout=120)
    peers, ours = [peer for peer, _ in pairs], [own for _, own in pairs]
    _assert_same(peers[0], peers, ours, 2e-6)
    _assert_same(one_process[setting], [one_process[setting]], ours, 1e-5)


ROUTERS: dict[str, dict[str, Any]] = {
    "post-softmax": {},
    "pre-softmax": {"moe_router_pre_softmax": True, "moe_router_topk": 1},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "groups": {
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk": 4,
        "moe_router_topk_scaling_factor": 1.5,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
    },
    "expert bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "capacity": {"moe_expert_capacity_factor": 1.0, **AUX},
    "global": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
    "sequences": {
        "moe_router_score_function": "sigmoid",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 0.1,
    },
    "all": {"moe_router_topk": gpt.EXPERTS},
}


@pytest.fixture
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


@pytest.mark.usefixtures("_groups")
@pytest.mark.parametrize(
    ("setting", "padded"),
    # With an expert bias Megatron's own router fails on padding: its mask does not fit its counts.
    [(name, padded) for name in ROUTERS for padded in (False, True) if not (padded and name == "expert bias")],
)
def test_router_equals_megatrons(setting: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # A backward pass outside of Megatron's schedules leaves a scale that they cannot write to.
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    config = gpt.make_config(ParallelConfig(), **ROUTERS[setting])
    groups = ProcessGroupCollection.use_mpu_process_groups()
    results = []
    for kind in (TopKRouter, TokenRouter):
        torch.manual_seed(2)
        router = kind(config=config, pg_collection=groups)
        router.set_layer_number(1)
        if router.expert_bias is not None:
            router.expert_bias.copy_(0.3 * torch.randn(gpt.EXPERTS))
        hidden = torch.randn(6, 2, config.hidden_size, requires_grad=True)
        weights = torch.rand(12, gpt.EXPERTS)
        mask = (torch.arange(6) >= 4)[:, None].expand(6, 2) if padded else None
        probs, chosen = router(hidden, mask)
        (probs * weights).sum().backward()
        counts = router.local_tokens_per_expert
        results.append((chosen, probs.detach(), router.weight.grad, hidden.grad, counts))
    (wanted_map, *wanted), (got_map, *got) = results
    assert torch.equal(got_map, wanted_map)
    for a, b in zip(wanted, got, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert float((a - b).abs().max()) <= 2e-6 * float(a.abs().max())


@pytest.mark.usefixtures("_groups")
def test_padding_counts_for_no_expert() -> None:
    config = gpt.make_config(ParallelConfig(), **ROUTERS["expert bias"])
    router = TokenRouter(config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    mask = torch.tensor([[False], [False], [True]])
    router(torch.randn(3, 1, config.hidden_size), mask)
    assert float(router.local_tokens_per_expert.sum()) == 2 * config.moe_router_topk


@pytest.mark.usefixtures("_groups")
def test_experts_without_tokens_get_zero_gradients() -> None:
    """Their hooks fire all the same, which overlapped reduction waits for."""
    experts = GroupedExperts(3, gpt.make_config(ParallelConfig()))
    hidden = torch.randn(4, 16, requires_grad=True)
    output, _ = experts(hidden, torch.tensor([0, 4, 0]), torch.ones(4))
    output.sum().backward()
    assert float(experts.w_down.grad[[0, 2]].abs().max()) == 0 < float(experts.w_down.grad[1].abs().max())
    experts.zero_grad()
    output, _ = experts(hidden[:0], torch.tensor([0, 0, 0]), torch.ones(0))
    assert output.shape == (0, 16)
    output.sum().backward()
    assert float(experts.w_gate_up.grad.abs().max()) == 0


@pytest.mark.usefixtures("_groups")
def test_weights_on_the_input_and_recomputation() -> None:
    config = gpt.make_config(
        ParallelConfig(),
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_grouped_gemm=True,
        recompute_granularity="selective",
        recompute_modules=["moe_act"],
    )
    experts = GroupedExperts(2, config)
    assert experts.recompute
    hidden, counts, probs = torch.randn(5, 16), torch.tensor([3, 2]), torch.rand(5)
    config.moe_apply_probs_on_input = True
    output, _ = experts(hidden, counts, probs)
    config.moe_apply_probs_on_input = False
    wanted, _ = experts(hidden * probs[:, None], counts, torch.ones(5))
    assert torch.equal(output, wanted)


def _initial(rank: int, size: int, parallel: ParallelConfig) -> list[tuple[int, np.ndarray]]:
    initialize(parallel)
    config = gpt.make_config(parallel)
    experts = GroupedExperts(gpt.EXPERTS // parallel.expert_model_parallel_size, config)
    first = experts.ep_group.rank() * experts.num_local_experts
    return [(first + i, weight.detach().numpy()) for i, weight in enumerate(experts.w_down)]


def test_initial_weights_do_not_depend_on_the_layout() -> None:
    (wanted,) = run_distributed(_initial, 1, ParallelConfig())
    for part in run_distributed(_initial, 2, ParallelConfig(expert_model_parallel_size=2)):
        for expert, weight in part:
            assert np.array_equal(weight, wanted[expert][1])
    cut = run_distributed(_initial, 2, gpt.LAYOUTS["tp2-etp2"][1])
    for expert, weight in wanted:
        assert np.array_equal(np.concatenate([part[expert][1] for part in cut], axis=1), weight)
    assert not np.array_equal(wanted[0][1], wanted[1][1])


def _overlapped(rank: int, size: int, parallel: ParallelConfig, folder: Path, overlap: bool) -> list[float]:
    initialize(parallel)
    model = gpt.build(gpt.make_config(parallel, **AUX), ours=True)
    gpt.load(model, folder)
    trainer = gpt.Trainer(model, distributed_optimizer=True, overlap=overlap)
    return [trainer.step(number) for number in range(3)]


def test_distributed_optimizer_with_overlapped_reduction(
    start: dict[str, Path], one_process: dict[str, gpt.Run]
) -> None:
    size, parallel = gpt.LAYOUTS["ep2-dp2"]
    for losses in run_distributed(_overlapped, size, parallel, start["aux"], True, timeout=120):
        np.testing.assert_allclose(losses, one_process["aux"].losses, rtol=1e-5, equal_nan=False)


def test_what_it_is_not_made_for_is_refused() -> None:
    initialize()
    try:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        config = gpt.make_config(ParallelConfig())
        for name, value, error in (
            ("moe_router_load_balancing_type", "sinkhorn", "keep Megatron's TopKRouter"),
            ("moe_router_fusion", True, "set it to False"),
        ):
            with pytest.raises(ConfigError, match=error):
                TokenRouter(dataclasses.replace(config, **{name: value}), groups)
        for fields, error in (
            ({"activation_func": torch.nn.functional.gelu}, "SwiGLU experts"),
            ({"add_bias_linear": True}, "add_bias_linear=False, got True"),
        ):
            changed = dataclasses.replace(config)
            vars(changed).update(fields)
            with pytest.raises(ConfigError, match=error):
                GroupedExperts(2, changed, pg_collection=groups)
        with pytest.raises(ConfigError, match="no MoELayer"):
            with_grouped_experts(get_gpt_layer_local_spec())
    finally:
        shutdown()


def test_specs_of_layers_blocks_and_mlps() -> None:
    layer = get_gpt_layer_local_spec(num_experts=4)
    before = moe_submodules(layer.submodules.mlp).router
    changed = with_grouped_experts(layer)
    assert moe_submodules(layer.submodules.mlp).router is before
    assert moe_submodules(changed.submodules.mlp).experts is GroupedExperts
    mixed = TransformerBlockSubmodules(layer_specs=[get_gpt_layer_local_spec(), layer, layer])
    dense, *mixtures = with_grouped_experts(mixed).layer_specs
    assert moe_submodules(dense.submodules.mlp) is None
    assert all(moe_submodules(spec.submodules.mlp).router is TokenRouter for spec in mixtures)
    own = moe_submodules(moe_layer_spec())
    assert (own.router, own.experts) == (TokenRouter, GroupedExperts)
    assert own.shared_experts is not None
