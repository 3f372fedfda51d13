"""TextGuidedMoE and Projector shared by 2 and 4 ranks: outputs and all gradients are those of one process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parrot_kernels.testing import make_spans
from parrot_sys.errors import ConfigError
from parrot_sys.modules.projector import Projector, ProjectorConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.modules.text_guided_moe import TextGuidedMoE
from parrot_sys.parallel import ExpertGroups, check_experts
from parrot_sys.testing.distributed import run_distributed

H, V, E, FFN = 12, 3, 4, 6  # hidden_size, visual rows an image, experts, inner columns
TEXT = 5

DENSE = TextGuidedMoEConfig(num_experts=E, ffn_hidden_size=FFN)
TOPK = TextGuidedMoEConfig(num_experts=E, ffn_hidden_size=FFN, routing="topk", topk=2, residual="paper")
SOME, UNEVEN, NONE = (3, 1, 2, 4), (5, 0, 1, 0), (0, 0, 0, 0)  # images of each data-parallel rank
TOP_1 = TextGuidedMoEConfig(
    num_experts=E, ffn_hidden_size=FFN, routing="topk", topk=1, renormalize=False, residual="none"
)
TOP_3 = TextGuidedMoEConfig(num_experts=E, ffn_hidden_size=FFN, routing="topk", topk=3, recompute=True)
CASES = [(config, images) for config in (DENSE, TOPK) for images in (SOME, UNEVEN, NONE)] + [
    (TOP_1, SOME),
    (TOP_3, SOME),
]


@dataclass(frozen=True)
class Layout:
    """Sizes over `world` ranks, in Megatron's order: tp (or etp) innermost, then ep, then copies."""

    world: int
    tp: int = 1
    ep: int = 1
    etp: int = 1

    def expert_part(self, rank: int) -> tuple[int, int]:
        """(rank in ep, rank in etp)."""
        return rank // self.etp % self.ep, rank % self.etp


LAYOUTS = {
    "ep2": Layout(2, ep=2),
    "etp2": Layout(2, etp=2),
    "tp2_etp2": Layout(2, tp=2, etp=2),  # the ranks that share the experts have the same images
    "tp2_ep2": Layout(2, tp=2, ep=2),
    "tp2": Layout(2, tp=2),  # whole experts on each rank, images split over them
    "ep4": Layout(4, ep=4),
    "ep2_dp2": Layout(4, ep=2),
    "ep2_etp2": Layout(4, ep=2, etp=2),
    "tp2_ep2_etp2": Layout(4, tp=2, ep=2, etp=2),
    "tp2_ep2_dp2": Layout(4, tp=2, ep=2),
    "tp2_ep4": Layout(4, tp=2, ep=4),
    "tp4_ep2": Layout(4, tp=4, ep=2),  # two ranks of one tp hold the same experts
}


def _group_of(rank: int, groups: list[list[int]]) -> ProcessGroup | None:
    """Every rank makes all groups; None where this rank is alone."""
    own = None
    for ranks in groups:
        if len(ranks) > 1 and (group := dist.new_group(ranks)) is not None and rank in ranks:
            own = group
    return own


def _groups(rank: int, layout: Layout) -> tuple[ExpertGroups, ProcessGroup | None]:
    """Groups of the experts, and the ranks that hold copies of this rank's."""

    def blocks(size: int) -> list[list[int]]:
        return [list(range(start, start + size)) for start in range(0, layout.world, size)]

    joints = blocks(layout.etp * layout.ep)
    groups = ExpertGroups(
        tp=_group_of(rank, blocks(layout.tp)),
        ep=_group_of(rank, [joint[offset :: layout.etp] for joint in joints for offset in range(layout.etp)]),
        etp=_group_of(rank, blocks(layout.etp)),
        joint=_group_of(rank, joints),
    )
    return groups, _group_of(rank, [list(copies) for copies in zip(*joints, strict=True)])


def _inputs(counts: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    """For each data-parallel rank features, text, spans, and the gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    inputs = []
    for count in counts:
        features, grad = (torch.randn(count, V, H, generator=generator) for _ in range(2))
        text = torch.randn(TEXT, H, generator=generator)
        inputs.append((features, text, *make_spans([TEXT], [count]), grad))
    return inputs


def _backward(module: TextGuidedMoE, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output and gradients of features and text."""
    features, text, start, end, grad = inputs
    features, text = features.clone().requires_grad_(), text.clone().requires_grad_()
    output, routing = module(features, text, start, end)
    (output * grad).sum().backward()
    assert routing.probs.shape == (len(features), E)
    return output.detach(), features.grad, text.grad


Result = tuple[tuple[Tensor, ...], dict[str, Tensor]]


def _on_rank(rank: int, layout: Layout) -> list[Result]:
    """For each case this rank's results, and its gradients summed over the ranks with copies of its experts."""
    groups, copies = _groups(rank, layout)
    results = []
    for config, counts in CASES:
        torch.manual_seed(1)
        module = TextGuidedMoE(config, H, groups=groups)
        tensors = _backward(module, _inputs(counts)[rank // layout.tp])
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        for name in ("w_gate_up", "w_down"):
            if copies is not None:
                dist.all_reduce(gradients[name], group=copies)
        results.append((tensors, gradients))
    return results


@pytest.mark.parametrize("name", LAYOUTS)
def test_shared_experts_equal_one_process(name: str) -> None:
    layout = LAYOUTS[name]
    by_rank = run_distributed(lambda rank, size: _on_rank(rank, layout), layout.world)
    for (config, counts), results in zip(CASES, zip(*by_rank, strict=True), strict=True):
        torch.manual_seed(1)
        whole = TextGuidedMoE(config, H)
        wanted = [_backward(whole, each) for each in _inputs(counts)[: layout.world // layout.tp]]
        _compare(layout, results, wanted, whole, f"{config.routing}-{config.topk} images {counts}")


def _compare(
    layout: Layout,
    results: tuple[Result, ...],
    wanted: list[tuple[Tensor, ...]],
    whole: TextGuidedMoE,
    case: str,
) -> None:
    for rank, (tensors, gradients) in enumerate(results):
        for tensor, want, name in zip(tensors, wanted[rank // layout.tp], ("y", "dx", "dtext"), strict=True):
            _assert_close(tensor, want, f"{case}: {name} of rank {rank}")
        ep, etp = layout.expert_part(rank)
        for name, dim in (("w_gate_up", 2), ("w_down", 1)):
            gradient = whole.get_parameter(name).grad
            part = gradient.chunk(layout.ep)[ep].chunk(layout.etp, dim)[etp]
            _assert_close(gradients[name], part, f"{case}: d{name} of rank {rank}", scale=gradient)
    for first in range(layout.tp):  # each of a tp group has the whole gradient of its images
        router = torch.stack([gradients["router_weight"] for _, gradients in results[first :: layout.tp]]).sum(0)
        _assert_close(router, whole.router_weight.grad, f"{case}: drouter_weight")


def _assert_close(actual: Tensor, wanted: Tensor, name: str, *, scale: Tensor | None = None) -> None:
    assert actual.shape == wanted.shape, name
    if wanted.numel():
        bound = 1e-5 * (wanted if scale is None else scale).abs().max()
        assert (actual - wanted).abs().max() <= bound, name


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp4x_gelu"])
def test_shared_projector_equals_one_process(kind: str) -> None:
    config = ProjectorConfig(type=kind)
    features, grad = torch.randn(4, V, 10), torch.randn(4, V, H)

    def run(group: ProcessGroup | None) -> tuple[Projector, Tensor, Tensor]:
        torch.manual_seed(1)
        projector = Projector(config, 10, H, group=group)
        leaf = features.clone().requires_grad_()
        output = projector(leaf)
        output.backward(grad)
        return projector, output.detach(), leaf.grad

    def on_rank(rank: int, size: int) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, int]]:
        projector, output, grad_features = run(dist.group.WORLD)
        gradients = {name: parameter.grad for name, parameter in projector.named_parameters()}
        return output, grad_features, gradients, projector.cut_dims()

    whole, output, grad_features = run(None)
    assert whole.cut_dims() == {}
    for rank, (got, got_features, gradients, cut) in enumerate(run_distributed(on_rank, 2)):
        _assert_close(got, output, "y")
        _assert_close(got_features, grad_features, "dx")
        assert len(cut) == 3 * (config.depth // 2)
        for name, parameter in whole.named_parameters():
            wanted = parameter.grad.chunk(2, cut[name])[rank] if name in cut else parameter.grad
            _assert_close(gradients[name], wanted, name, scale=parameter.grad)


def test_experts_that_cannot_be_shared() -> None:
    check_experts(6, 40, 3, 8)
    with pytest.raises(ConfigError, match=r"num_experts must be a multiple of parallel.expert_model_parallel_size=4"):
        check_experts(6, 40, 4, 1)
    with pytest.raises(ConfigError, match=r"got 6: set moe.num_experts to 4 or 8, or .*_parallel_size to 3"):
        check_experts(6, 40, 4, 1)
    with pytest.raises(ConfigError, match=r"ffn_hidden_size .* got 40: set moe.ffn_hidden_size to 39 or 42, or"):
        check_experts(6, 40, 1, 3)
    with pytest.raises(ConfigError, match=r"set moe.num_experts to 8, or"):
        check_experts(6, 40, 8, 1)
