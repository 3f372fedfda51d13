"""A LLaVA-style model of somebody else's, which gains text-guided routing by one call.

`Llava` below is what people write with Megatron-Core: a patch embedding, a projector, a GPTModel. It knows nothing of
parrot_sys. The task: name what is in a picture in the language of the prompt, so the same picture has another answer in
each language. The program trains the model twice from the same weights, as it is and with `add_text_guidance`, and
shows both losses, and which experts the pictures went to in each language.

    python examples/llava_text_guided.py
    torchrun --nproc-per-node 2 examples/llava_text_guided.py --tensor-parallel 2
    torchrun --nproc-per-node 4 examples/llava_text_guided.py --tensor-parallel 2 --experts 6 --topk 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import parrot_sys.megatron  # first: it lets Megatron-Core run on machines without a GPU

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from parrot_sys import platform
from parrot_sys.errors import ConfigError
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.modules.routing_config import TextGuidedMoEConfig

LANGUAGES, THINGS = 3, 8
IMAGE = -200
PROMPT = 3  # two words of the language and the marker of the picture; then a question mark, then the answer
QUESTION = 2 * LANGUAGES
VOCAB = 32
"""Words of the languages, the question, a name for each thing in each language; a multiple of --tensor-parallel."""
SAMPLES = 24
"""Of a global batch."""


class Llava(MegatronModule):
    """Pictures through patch embedding and projector to where the text has markers."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder  # Megatron's schedules ask for it
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.patches = nn.Conv2d(3, 16, kernel_size=14, stride=14)
        self.projector = nn.Linear(16, config.hidden_size)
        self.language_model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(),
            vocab_size=VOCAB,
            max_sequence_length=64,
            position_embedding_type="rope",
            scatter_embedding_sequence_parallel=False,
        )

    def set_input_tensor(self, input_tensor: Any) -> None:
        """For Megatron's schedules; there is one pipeline stage."""

    def forward(self, images: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Losses [b, rows] of samples with one picture each, [b, 3, 28, 28] and token ids [b, s]."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        rows = torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1)
        visual = self.projector(rows.transpose(0, 1))  # [V, b, H]
        words = self.language_model.embedding(input_ids=input_ids.clamp(min=0), position_ids=None)  # [s, b, H]
        where, more = PROMPT - 1, len(visual) - 1
        hidden = torch.cat([words[:where], visual, words[where + 1 :]])
        labels = F.pad(labels, (more, 0))  # the markers come before everything with a label
        causal = torch.ones(len(hidden), len(hidden), dtype=torch.bool, device=hidden.device).triu(1)[None, None]
        return self.language_model(None, None, causal, decoder_input=hidden, labels=labels)[:, more:]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tensor-parallel", type=int, default=1, help="processes that share each matrix; the rest see other samples")
    add("--experts", type=int, default=4, help="experts between projector and decoder (default 4)")
    add("--topk", type=int, help="experts each picture goes to (default: all of them, weighted)")
    add("--steps", type=int, default=60, help="optimizer steps of each training (default 60)")
    args = parser.parse_args(argv)
    if args.topk is not None and not 1 <= args.topk <= args.experts:
        parser.error(f"--topk must be in [1, --experts={args.experts}], got {args.topk}")
    return args


def build_model(args: argparse.Namespace, *, guided: bool) -> Llava:
    """The model, and the one call that adds routing to it."""
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=48,
        init_method_std=0.3,  # words far enough apart for a router to tell them
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=args.tensor_parallel,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
    model = Llava(config)
    if guided:
        routing = {"routing": "topk", "topk": args.topk} if args.topk else {}
        parrot_sys.megatron.add_text_guidance(
            model,
            TextGuidedMoEConfig(num_experts=args.experts, ffn_hidden_size=32, **routing),
            projection="projector",
            guidance=lambda call: (
                call["input_ids"],
                # The answer is no part of the input, so all text guides.
                parrot_sys.megatron.text_guidance(call["input_ids"], image_token_id=IMAGE),
            ),
        )
    return model.to(platform.device())


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def make_batch(step: int) -> Batch:
    """This rank's part of a global batch: pictures, token ids, labels (0 where there is none), languages."""
    fixed, random = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1000 + step)
    prototypes = torch.randn(THINGS, 3, 28, 28, generator=fixed)
    names = torch.stack([torch.randperm(THINGS, generator=fixed) for _ in range(LANGUAGES)])
    language = torch.randint(LANGUAGES, (SAMPLES,), generator=random)
    thing = torch.randint(THINGS, (SAMPLES,), generator=random)
    images = prototypes[thing] + 0.5 * torch.randn(SAMPLES, 3, 28, 28, generator=random)
    answer = QUESTION + 1 + language * THINGS + names[language, thing]
    marker, question = torch.full_like(language, IMAGE), torch.full_like(language, QUESTION)
    ids = torch.stack([2 * language, 2 * language + 1, marker, question], dim=1)
    labels = torch.zeros_like(ids)
    labels[:, -1] = answer
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    images, ids, labels, language = (t.chunk(size)[rank].to(platform.device()) for t in (images, ids, labels, language))
    return images, ids, labels, language


def forward_step(data: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Any]:
    """Runs one micro-batch; Megatron's schedules call it for each."""
    images, ids, labels, _ = next(data)
    losses = model(images, ids, labels)[:, -1]
    return losses, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})


def train(model: Llava, args: argparse.Namespace, title: str) -> list[float]:
    """Megatron's data parallelism, schedule and optimizer."""
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3, weight_decay=0.0), [wrapped])
    losses = []
    progress = tqdm(range(args.steps), desc=title, unit="step", disable=dist.get_rank() > 0)
    for step in progress:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        (report,) = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([make_batch(step)]),
            model=wrapped,
            num_microbatches=1,
            seq_length=PROMPT + 1,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        loss = report["loss"] / parallel_state.get_data_parallel_world_size()
        dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def routes(model: Llava, steps: int) -> Tensor:
    """Mean weight of each expert for the pictures of each language, on batches that were not trained on."""
    sums = torch.zeros(LANGUAGES, model.text_guided.moe.config.num_experts + 1)
    for step in range(steps, steps + 4):
        images, ids, labels, language = make_batch(step)
        model(images, ids, labels)
        counted = F.pad(model.text_guided.routing.probs.cpu().float(), (0, 1), value=1.0)
        sums.index_add_(0, language.cpu(), counted)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    return sums[:, :-1] / sums[:, -1:].clamp(min=1)


def show(args: argparse.Namespace, plain: list[float], guided: list[float], weights: Tensor) -> None:
    print(f"\n{'step':>4}  {'as it was':>10}  {'text-guided':>11}   (loss)")
    for step in sorted({*range(0, args.steps, max(1, args.steps // 6)), args.steps - 1}):
        print(f"{step:4}  {plain[step]:10.4f}  {guided[step]:11.4f}")
    print("\nmean weight of each expert for pictures with a prompt in")
    for language, row in enumerate(weights.tolist()):
        print(f"  language {language}:  {'  '.join(f'{value:.3f}' for value in row)}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    platform.set_cpu_threads()
    parallel = ParallelConfig(tensor_model_parallel_size=args.tensor_parallel)
    try:
        initialize(parallel)
        if SAMPLES % (ranks := parallel_state.get_data_parallel_world_size()):
            raise ConfigError(f"{SAMPLES} samples cannot be dealt to {ranks} data-parallel ranks: start fewer")
    except ConfigError as error:
        sys.exit(f"llava_text_guided.py: {error}")
    plain = train(build_model(args, guided=False), args, "as it was  ")
    model = build_model(args, guided=True)
    guided = train(model, args, "text-guided")
    weights = routes(model, args.steps)
    if dist.get_rank() == 0:
        show(args, plain, guided, weights)
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
