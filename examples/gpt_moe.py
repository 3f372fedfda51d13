"""A plain Megatron-Core GPT training loop, once with Megatron's own experts and once with those of parrot_sys.

Both runs start from the same weights: the first one writes a Megatron checkpoint, the second one loads it. They see the
same batches, so their losses must be equal up to rounding; a table shows them side by side, and the program ends with
exit code 1 when they are not.

    python examples/gpt_moe.py
    torchrun --nproc-per-node 2 examples/gpt_moe.py --expert-parallel 2 --dispatcher alltoall
    torchrun --nproc-per-node 4 examples/gpt_moe.py --tensor-parallel 2 --expert-parallel 2

What makes the difference between the two runs is one line in `build_model`.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import parrot_sys.megatron  # first: it lets Megatron-Core run on machines without a GPU

# isort: split
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from parrot_sys import platform
from parrot_sys.errors import ConfigError
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown

VOCAB, SEQ = 64, 32
TOLERANCE = 1e-5
"""Relative: float32 keeps seven digits, and Adam carries the rounding of one step on into the next ones."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = functools.partial(parser.add_argument, type=int)
    add("--tensor-parallel", default=1, help="processes that share each matrix; above 1 with sequence parallelism")
    add("--expert-parallel", default=1, help="processes that share the experts; the rest of them see other samples")
    add("--expert-tensor-parallel", help="processes that share each expert (default: as --tensor-parallel)")
    add("--experts", default=8, help="experts of each layer, a multiple of --expert-parallel (default 8)")
    add("--topk", default=2, help="experts that each token goes to (default 2)")
    add("--layers", default=2, help="transformer layers (default 2)")
    add("--steps", default=10, help="optimizer steps of each run (default 10)")
    add("--global-batch-size", default=8, help="samples of a step, a multiple of the data-parallel size (default 8)")
    parser.add_argument(
        "--dispatcher",
        choices=("allgather", "alltoall"),
        default="allgather",
        help="how Megatron brings tokens to their experts: all to everyone, or each where it has to go",
    )
    args = parser.parse_args(argv)
    if args.experts % args.expert_parallel:
        parser.error(f"--experts must be a multiple of --expert-parallel={args.expert_parallel}, got {args.experts}")
    if not 1 <= args.topk <= args.experts:
        parser.error(f"--topk must be in [1, --experts={args.experts}], got {args.topk}")
    return args


def make_config(args: argparse.Namespace) -> TransformerConfig:
    """A Qwen-MoE style model: RMSNorm, SwiGLU experts, top-k routing with a balancing loss."""
    return TransformerConfig(
        num_layers=args.layers,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=128,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=args.experts,
        moe_ffn_hidden_size=64,
        moe_router_topk=args.topk,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type=args.dispatcher,
        tensor_model_parallel_size=args.tensor_parallel,
        sequence_parallel=args.tensor_parallel > 1,  # Megatron wants it for MoE layers
        expert_model_parallel_size=args.expert_parallel,
        expert_tensor_parallel_size=args.expert_tensor_parallel,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )


def build_model(config: TransformerConfig, *, ours: bool) -> GPTModel:
    """Megatron's GPTModel; `ours` is the only thing that differs between the two runs."""
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    # Without Transformer Engine and apex, Megatron has no norm that works under sequence parallelism.
    spec = parrot_sys.megatron.with_norms(spec, config.num_layers)
    if ours:
        spec = parrot_sys.megatron.with_grouped_experts(spec)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQ,
        position_embedding_type="rope",
    )
    return model.to(platform.device())


def samples(args: argparse.Namespace, step: int) -> Iterator[torch.Tensor]:
    """This rank's part of a global batch, a sample at a time: counting up by a random stride, so there is a rule."""
    generator = torch.Generator().manual_seed(step)
    begin, stride = torch.randint(1, VOCAB, (2, args.global_batch_size, 1), generator=generator)
    tokens = (begin + (stride % 5 + 1) * torch.arange(SEQ + 1)) % VOCAB
    parts = tokens.chunk(parallel_state.get_data_parallel_world_size())
    return iter(parts[parallel_state.get_data_parallel_rank()].to(platform.device()).split(1))


def forward_step(data: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Runs one micro-batch; Megatron's schedules call it for each."""
    tokens = next(data)
    positions = torch.arange(SEQ, device=tokens.device)[None]
    causal = torch.ones(SEQ, SEQ, dtype=torch.bool, device=tokens.device).triu(1)[None, None]
    output = model(tokens[:, :-1], positions, causal, labels=tokens[:, 1:])
    return output, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})


def train(model: GPTModel, args: argparse.Namespace, title: str) -> list[float]:
    """The loop: Megatron's data parallelism, schedule and optimizer."""
    config = model.config
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3, weight_decay=0.0), [wrapped])
    config.grad_scale_func = optimizer.scale_loss
    ranks = parallel_state.get_data_parallel_world_size()
    losses = []
    progress = tqdm(range(args.steps), desc=title, unit="step", disable=dist.get_rank() > 0)
    for step in progress:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=samples(args, step),
            model=wrapped,
            num_microbatches=args.global_batch_size // ranks,
            seq_length=SEQ,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        loss = torch.stack([report["loss"] for report in reports]).mean() / ranks
        dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def write_checkpoint(model: GPTModel, folder: str) -> None:
    """Megatron's distributed checkpoint."""
    dist_checkpointing.save(model.sharded_state_dict(), folder)


def read_checkpoint(model: GPTModel, folder: str) -> None:
    """Loads it; the keys do not tell whose experts wrote them."""
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))


def shared_folder(root: str) -> str:
    """A new folder whose name all ranks know."""
    name = [tempfile.mkdtemp(dir=root) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    return name[0]


def compare(peer: list[float], ours: list[float]) -> bool:
    """Prints the table; whether the losses agree."""
    print(
        f"\n{'step':>4}  {'Megatron SequentialMLP':>22}  {'parrot_sys GroupedExperts':>25}  {'relative difference':>19}"
    )
    differences = [abs(a - b) / abs(a) for a, b in zip(peer, ours, strict=True)]
    for step, (a, b, difference) in enumerate(zip(peer, ours, differences, strict=True)):
        print(f"{step:4}  {a:22.7f}  {b:25.7f}  {difference:19.1e}")
    equal = all(difference <= TOLERANCE for difference in differences)  # false for losses that are no numbers
    verdict, worst = "equal up to rounding" if equal else "NOT EQUAL", max(differences, default=0.0)
    print(f"\n{verdict}: largest difference {worst:.1e}, allowed {TOLERANCE:.0e}")
    return equal


def start(args: argparse.Namespace) -> None:
    """Process groups: `torch.distributed` and Megatron's `parallel_state`, also without torchrun."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=args.tensor_parallel,
        sequence_parallel=args.tensor_parallel > 1,
        expert_model_parallel_size=args.expert_parallel,
        expert_tensor_parallel_size=args.expert_tensor_parallel,
    )
    initialize(parallel)
    ranks = parallel_state.get_data_parallel_world_size()
    if args.global_batch_size % ranks:
        raise ConfigError(
            f"--global-batch-size must be a multiple of the {ranks} data-parallel ranks, got {args.global_batch_size}"
        )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    platform.set_cpu_threads()
    # Megatron's own calls of what newer versions of torch have other names for.
    warnings.simplefilter("ignore", FutureWarning)
    try:
        start(args)
    except ConfigError as error:
        sys.exit(f"gpt_moe.py: {error}")
    with tempfile.TemporaryDirectory() as root:
        folder = shared_folder(root)
        peer_model = build_model(make_config(args), ours=False)
        write_checkpoint(peer_model, folder)
        peer = train(peer_model, args, "SequentialMLP ")
        model = build_model(make_config(args), ours=True)
        read_checkpoint(model, folder)
        ours = train(model, args, "GroupedExperts")
    # Every rank compares the same numbers.
    first = dist.get_rank() == 0
    equal = compare(peer, ours) if first else True
    shutdown()
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
