"""Real training steps of small models, and what they held and sent: what the formulas are compared with."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.languages import MMMB_LANGUAGES
from parrot_sys.megatron.embed.moe_layer import TokenRouter
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime.initialize import initialize
from parrot_sys.megatron.runtime.optimizer import build_optimizer, wrap_data_parallel
from parrot_sys.systems.build import build_chunks
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.job import make_job
from parrot_sys.systems.layout import Layout
from parrot_sys.systems.parts import set_trainable
from parrot_sys.systems.registry import system_of
from parrot_sys.systems.system_costs import Job, MicroBatch
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.towers import NEWLINE, PictureRows
from parrot_sys.training.step import StepRunner


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and how the model is trained in it."""

    layout: Layout = field(default_factory=Layout)
    trainable: Mapping[str, bool] = field(default_factory=dict)
    bypass: tuple[str, ...] = ()
    precision: str = "fp32"
    micro_batches: int = 1

    def learning(self, model: ParrotConfig) -> dict[str, bool]:
        return system_of(model).learning(model, self.trainable, self.bypass)

    def job(self, model: ParrotConfig) -> Job:
        return make_job(model, self.learning(model), precision=self.precision, bypass=self.bypass, kernels="cpu")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    messages: dict[str, int]


def make_batch(
    config: ParrotConfig, *, samples: int, prompt: int = 24, answer: int = 20, images: int = 1
) -> PackedBatch:
    """`samples` samples of one kind: a text row, the rows of the pictures, the rest of prompt and answer.

    Each prompt is one token over and over, another one for each sample, so that `balance_routes` can choose routes.
    """
    generator = torch.Generator().manual_seed(3)
    tiling, side = config.tiling, config.vision.image_size
    picture = PictureRows.whole(config.rows_per_image) if tiling is None else tiling.rows(2 * side, int(1.7 * side))
    visual, per_image = len(picture.source) * images, config.vision.num_visual_rows
    length, n = prompt + visual + answer, samples * images * picture.tiles
    first = torch.arange(samples * images)[:, None] * picture.tiles * per_image
    source = torch.from_numpy(picture.source)
    ids = torch.randint(0, config.llm.vocab_size, (samples, length), generator=generator)
    ids[:, : prompt + visual] = torch.arange(samples)[:, None]
    ids[:, 1 : 1 + visual] = IMAGE_TOKEN_ID
    labels = torch.full_like(ids, IGNORE_ID)
    labels[:, length - answer - 1 : -1] = ids[:, length - answer :]
    guiding = torch.zeros_like(ids, dtype=torch.bool)
    guiding[:, : prompt + visual] = ids[:, : prompt + visual] != IMAGE_TOKEN_ID
    starts = torch.arange(samples, dtype=torch.int32).repeat_interleave(images * picture.tiles) * prompt
    return PackedBatch(
        input_ids=ids.flatten(),
        labels=labels.flatten(),
        label_rows=(labels.flatten() != IGNORE_ID).nonzero().flatten(),
        position_ids=torch.arange(length).repeat(samples),
        cu_seqlens=torch.arange(samples + 1, dtype=torch.int32) * length,
        max_seqlen=length,
        visual_rows=(ids.flatten() == IMAGE_TOKEN_ID).nonzero().flatten(),
        visual_source=torch.where(source == NEWLINE, n * per_image, first + source).flatten(),
        guidance_rows=guiding.flatten().nonzero().flatten() if images else torch.empty(0, dtype=torch.int64),
        guidance_start=starts,
        guidance_end=starts + prompt,
        image_sample=torch.arange(samples).repeat_interleave(images * picture.tiles),
        pixel_values=torch.randn(n, 3, side, side, generator=generator) if n else None,
        image_features=None,
    )


def even_experts(model: ParrotConfig, ranks: int) -> ParrotConfig:
    """The model with as many text-guided experts as `ranks` can share, at least those it has."""
    experts = -(-model.moe.num_experts // ranks) * ranks
    return replace(model, moe=replace(model.moe, num_experts=experts))


@torch.no_grad()
def balance_routes(model: MultimodalModel, batch: PackedBatch) -> None:
    """Sets the router so that top-k routes go through all sets of experts in turn, halves of the experts alternating.

    Six images are balanced over two ranks for top-1, and for top-2 of four experts, of which there are six pairs.
    """
    assert model.moe is not None, "the first stage has the experts"
    config = model.moe.config
    half = config.num_experts // 2
    order = sorted(range(config.num_experts), key=lambda expert: (expert % half, expert))
    routes = itertools.cycle(itertools.combinations(order, config.topk))
    wanted = torch.full((batch.num_images, config.num_experts), -1.0)
    for image, route in zip(range(batch.num_images), routes, strict=False):
        wanted[image, list(route)] = 1.0
    # All guiding rows of an image are alike, so the text that it attends to is any of them.
    text = model.decoder.embed(batch.input_ids[batch.guidance_rows[batch.guidance_start]])
    model.moe.router_weight.copy_((torch.linalg.pinv(text.float()) @ wanted).T)


class BalancedRouter(TokenRouter):
    """A router that gives all experts as many rows, whatever its weights are, and learns as the real one."""

    def gating(self, input: Tensor) -> Tensor:
        """Logits with the experts of each row ahead, in turn."""
        logits = super().gating(input)
        rows, experts = logits.flatten(0, 1).shape
        ahead = torch.zeros(rows, experts)
        chosen = torch.arange(rows * self.topk).view(rows, self.topk) % experts
        return logits + ahead.scatter_(1, chosen, 100.0).view_as(logits)


def balance_token_routes(chunks: Iterable[MultimodalModel]) -> None:
    """Makes the routers inside the decoder's layers balanced ones."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TokenRouter):
                module.__class__ = BalancedRouter


def sizes(batch: PackedBatch) -> MicroBatch:
    """What the formulas take of a micro-batch."""
    return MicroBatch(
        rows=batch.num_rows,
        images=batch.num_images,
        visual_rows=batch.visual_rows.numel(),
        guidance_rows=batch.guidance_rows.numel(),
        label_rows=batch.label_rows.numel(),
        squared_lengths=float(batch.cu_seqlens.diff().double().square().sum()),
        samples=batch.num_samples,
    )


class SavedBytes:
    """Peak of the storages that autograd keeps, while its context is open; backward passes let go of them."""

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._users: Counter[int] = Counter()
        self._now = self.peak = 0

    def hooks(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(tensor, self), lambda kept: kept.tensor)

    def add(self, tensor: Tensor, sign: int) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._excluded:
            return
        was = self._users[address] > 0
        self._users[address] += sign
        self._now += storage.nbytes() * ((self._users[address] > 0) - was)
        self.peak = max(self.peak, self._now)


class _Kept:
    """A saved tensor; counted for as long as autograd holds this object."""

    def __init__(self, tensor: Tensor, owner: SavedBytes) -> None:
        self.tensor, self._owner = tensor, owner
        owner.add(tensor, 1)

    def __del__(self) -> None:
        self._owner.add(self.tensor, -1)


_OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "allreduce_coalesced_": "all_reduce",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "send": "send",
}


class Recorder(TorchDispatchMode):
    """Payload of every collective of this rank, by operation, in the units of `planning.communication`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = _OPERATIONS.get(function._schema.name.split("::")[1])
            if name is not None and _group_size(args) > 1:
                self.bytes[name] += max(_bytes(argument) for argument in args[:2])
        return function(*args, **(kwargs or {}))


def _group_size(args: Any) -> int:
    """Ranks of the group; Megatron also calls collectives in groups of one."""
    groups = [argument for argument in args if isinstance(argument, torch.ScriptObject)]
    groups = [dist.ProcessGroup.unbox(group) for group in groups if "ProcessGroup" in str(group._type())]
    return groups[0].size()


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0


def run(model: ParrotConfig, case: Case, batch: PackedBatch) -> dict[int, Measured]:
    """One step on as many processes as the layout has; what the first rank of each pipeline stage held and sent."""
    ranks = run_distributed(_step, case.layout.num_gpus, model, case, batch)
    return dict(enumerate(ranks[:: len(ranks) // case.layout.pipeline]))


def _step(rank: int, world_size: int, config: ParrotConfig, case: Case, batch: PackedBatch) -> Measured:
    layout = case.layout
    initialize(layout.parallel)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    recompute = "full" if layout.recompute else "none"
    chunks = build_chunks(config, layout.parallel, dtype=dtype, recompute=recompute, bypass=case.bypass)
    set_trainable(chunks, case.learning(config))
    if config.moe.num_experts and chunks[0].pre_process and config.moe.routing == "topk":
        balance_routes(chunks[0], batch)
    balance_token_routes(chunks)
    wrapped = wrap_data_parallel(chunks, distributed_optimizer=layout.distributed_optimizer)
    optimizer = build_optimizer(wrapped, lr=1e-3)
    runner = StepRunner(
        chunks=wrapped,
        device=torch.device("cpu"),
        num_experts=config.moe.num_experts,
        languages=MMMB_LANGUAGES,
        num_visual_rows=config.vision.num_visual_rows,
        optimizer=optimizer,
    )
    buffers = [buffer for chunk in wrapped for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    held = [tensor for chunk in chunks for tensor in [*chunk.parameters(), *chunk.buffers()]]
    inputs = [] if case.learning(config)["vision"] or batch.pixel_values is None else [batch.pixel_values]
    saved, recorder = SavedBytes([*held, *inputs]), Recorder()
    with recorder, saved.hooks():
        runner.train([batch] * case.micro_batches, 1)
    return Measured(
        parameters=_storages(held),
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=_optimizer_bytes(optimizer, held),
        activations=saved.peak,
        messages=dict(recorder.bytes),
    )


def _storages(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _optimizer_bytes(optimizer: Any, held: Iterable[Tensor]) -> int:
    """State, and main parameters that are no part of the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            tensors = [*group["params"]]
            for parameter in group["params"]:
                tensors += [v for v in part.optimizer.state[parameter].values() if isinstance(v, Tensor)]
            total += sum(t.nbytes for t in tensors if t.untyped_storage().data_ptr() not in own)
    return total
