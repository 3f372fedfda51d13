"""Stage `end_to_end`: whole training steps and whole answers of Parrot at real layer sizes, beside other code.

Training starts from the features of the images, as with cached features, and trains everything after the tower:
`parrot` is this project's step; `released_loop` is the decoder of transformers after the released code's loop over
samples and experts; `qwen2` is that decoder alone, on as many rows. The last two keep float32 weights, which autocast
rounds, and so need as many bytes a parameter as ours. All have the same number of layers: as many as fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.workload import Unavailable

if TYPE_CHECKING:
    from parrot_sys.data.batch import PackedBatch
    from parrot_sys.systems.config import ParrotConfig

WORKERS = 1
ROW_SECONDS = 300
PARTS = {"vision": False, "projector": True, "moe": True, "llm": True}
BYTES_A_PARAMETER = 18  # bfloat16 weight, float32 gradient, weight and two moments
SHARE_OF_MEMORY = 0.8  # for these; the rest is for activations


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of a run; n samples with one image, `prompt` ids before an answer of `answer` ids."""

    samples: int
    prompt: int
    answer: int
    steps: int


REAL = Sizes(samples=4, prompt=128, answer=64, steps=5)
TOY = Sizes(samples=2, prompt=6, answer=4, steps=2)


def rows(device: str) -> list[str]:
    """`train/CODE` and `decode/CODE`."""
    return ["train/parrot", "train/released_loop", "train/qwen2", "decode/parrot", "decode/qwen2"]


def run_row(row: str, device: str) -> dict[str, Any]:
    """Tokens a second, share of the peak of the card, and peak memory of one code.

    Raises:
        Unavailable: it needs what is not here.
    """
    what, code = row.split("/")
    sizes = TOY if device == "cpu" else REAL
    try:
        return {"train": _train, "decode": _decode}[what](code, sizes, torch.device(device))
    except torch.OutOfMemoryError as error:
        raise Unavailable(f"needs more memory than there is: {error}") from error


def model_config(device: torch.device) -> ParrotConfig:
    """Parrot-7B with as many decoder layers as fit, or a toy on the CPU."""
    from parrot_sys.models.llm import LLMConfig
    from parrot_sys.modules.routing_config import TextGuidedMoEConfig
    from parrot_sys.systems.config import ParrotConfig
    from parrot_sys.towers import VisionConfig

    if device.type == "cuda":
        whole = ParrotConfig()
        layers = layers_that_fit(torch.cuda.get_device_properties(device).total_memory, whole)
        return replace(whole, llm=replace(whole.llm, num_layers=layers))
    llm = LLMConfig(
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_query_groups=2,
        ffn_hidden_size=64,
        vocab_size=96,
        max_position_embeddings=64,
    )
    vision = VisionConfig(
        image_size=56, hidden_size=32, num_layers=2, num_attention_heads=2, ffn_hidden_size=64, select_layer=-1
    )
    return ParrotConfig(
        vision=vision, llm=llm, moe=TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=16), max_seq_len=64
    )


def layers_that_fit(memory: int, model: ParrotConfig) -> int:
    """Decoder layers whose training state fits into `memory` bytes beside the other parts; at least one."""
    llm, moe = model.llm, model.moe
    attention = 2 * llm.hidden_size * llm.kv_channels * (llm.num_attention_heads + llm.num_query_groups)
    layer = attention + 3 * llm.hidden_size * llm.ffn_hidden_size
    rest = 2 * llm.vocab_size * llm.hidden_size + 3 * moe.num_experts * llm.hidden_size * moe.ffn_hidden_size
    parameters = SHARE_OF_MEMORY * memory / BYTES_A_PARAMETER
    return max(1, min(llm.num_layers, int((parameters - rest) / layer)))


def _batch(model: ParrotConfig, sizes: Sizes) -> PackedBatch:
    from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
    from parrot_sys.data.packing import Sample, pack_samples

    make = torch.Generator().manual_seed(0)
    num_rows, width = model.vision.num_visual_rows, model.vision.hidden_size
    samples = []
    for _ in range(sizes.samples):
        ids = torch.randint(model.llm.vocab_size, (sizes.prompt + sizes.answer,), generator=make)
        ids[0] = IMAGE_TOKEN_ID
        labels = ids.clone()
        labels[: sizes.prompt] = IGNORE_ID
        features = torch.randn(1, num_rows, width, generator=make)
        samples.append(Sample(input_ids=ids, labels=labels, image_features=features))
    return pack_samples(samples, num_visual_rows=num_rows)


def _train(code: str, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    from parrot_sys.megatron.runtime.initialize import initialize, shutdown
    from parrot_sys.systems.flops import FlopCounter
    from parrot_sys.training.metrics import peak_flops

    model = model_config(device)
    batch = _batch(model, sizes)
    rated = replace(model, moe=replace(model.moe, num_experts=0)) if code == "qwen2" else model
    flops = FlopCounter(rated, PARTS, cached_features=True).count(batch)
    initialize()
    try:
        step = {"parrot": _our_step, "released_loop": _their_step, "qwen2": _their_step}[code](
            model, batch, device, with_experts=code != "qwen2"
        )
        seconds, losses = _timed(step, sizes.steps, device)
    finally:
        shutdown()
    return {
        "layers": model.llm.num_layers,
        "rows_a_step": batch.num_rows,
        "losses": losses,
        **_figures(seconds, batch.num_rows, device),
        "mfu": None if (peak := peak_flops(device)) is None else flops / seconds / peak,
    }


def _our_step(
    model: ParrotConfig, batch: PackedBatch, device: torch.device, *, with_experts: bool
) -> Callable[[], float]:
    assert with_experts
    from parrot_sys.megatron.runtime.initialize import ParallelConfig
    from parrot_sys.megatron.runtime.optimizer import build_optimizer, wrap_data_parallel
    from parrot_sys.systems.build import build_model
    from parrot_sys.systems.parts import set_trainable
    from parrot_sys.training.step import StepRunner

    torch.manual_seed(0)
    built = build_model(model, ParallelConfig(), dtype=_dtype(device), device=device, with_vision_tower=False)
    set_trainable(built, {part: learns for part, learns in PARTS.items() if part != "vision"})
    chunks = wrap_data_parallel([built], distributed_optimizer=False, overlap=False)
    runner = StepRunner(
        chunks=chunks,
        device=device,
        num_experts=model.moe.num_experts,
        num_visual_rows=model.vision.num_visual_rows,
        languages=("en",),
        optimizer=build_optimizer(chunks, lr=1e-4),
    )
    number = iter(range(1, 10**6))
    return lambda: float(runner.train([batch], next(number)).metrics.loss)


class _Released(nn.Module):
    """Projector and loop over samples and experts as released, before transformers' decoder; or that alone."""

    def __init__(self, model: ParrotConfig, *, with_experts: bool) -> None:
        super().__init__()
        from benchmarks.released_loop import ReleasedLoop
        from parrot_sys.modules.text_guided_moe import TextGuidedMoE

        hidden = model.llm.hidden_size
        self.decoder = _their_decoder(model)
        self.projector = self.loop = None
        if with_experts:
            width = model.vision.hidden_size
            self.projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            self.loop = ReleasedLoop(model.moe, TextGuidedMoE(model.moe, hidden).state_dict())

    def forward(self, ids: Tensor, labels: Tensor, features: Tensor) -> Tensor:
        """Loss of n samples whose first V rows are those of their image: ids [n, V + N], labels likewise."""
        rows = self.decoder.get_input_embeddings()(ids)
        if self.loop is not None and self.projector is not None:
            num_images, num_rows = features.shape[:2]
            text = rows[:, num_rows:].flatten(0, 1)
            ends = torch.arange(1, num_images + 1) * (rows.shape[1] - num_rows)
            routed = self.loop(self.projector(features), text, ends - ends[0], ends)
            rows = torch.cat((routed.to(rows), rows[:, num_rows:]), dim=1)
        return self.decoder(inputs_embeds=rows, labels=labels).loss


def _their_step(
    model: ParrotConfig, batch: PackedBatch, device: torch.device, *, with_experts: bool
) -> Callable[[], float]:
    from parrot_sys.data.constants import IGNORE_ID

    torch.manual_seed(0)
    module = _Released(model, with_experts=with_experts).to(device)
    module.train()
    assert batch.image_features is not None
    num_images = len(batch.image_features)
    length = batch.num_rows // num_images
    ids = batch.input_ids.view(num_images, length).clamp(min=0).to(device)
    labels = torch.full_like(ids, IGNORE_ID)
    answer = batch.label_rows.numel() // num_images
    labels[:, length - answer :] = ids[:, length - answer :]
    features = batch.image_features.to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = module(ids, labels, features)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _decode(code: str, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    from parrot_sys.data.constants import IMAGE_TOKEN_ID
    from parrot_sys.inference.model import ParrotForConditionalGeneration
    from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
    from parrot_sys.systems.build import build_model

    model, new = model_config(device), sizes.answer
    torch.manual_seed(0)
    rows = model.vision.num_visual_rows + sizes.prompt - 1
    ids = torch.randint(model.llm.vocab_size, (sizes.samples, sizes.prompt))
    ids[:, 0] = IMAGE_TOKEN_ID
    initialize()
    try:
        if code == "parrot":
            side = model.vision.image_size
            images = torch.randn(sizes.samples, 3, side, side).to(device)
            built = build_model(model, ParallelConfig(), dtype=_dtype(device), device=device)
            ours = ParrotForConditionalGeneration(built, pad_token_id=0)
            run = lambda: ours.generate(ids.to(device), images=images, max_new_tokens=new)  # noqa: E731
        else:
            decoder = _their_decoder(model).to(device, _dtype(device)).eval()
            text = ids[:, 1:2].expand(-1, rows).to(device)
            run = lambda: decoder.generate(  # noqa: E731
                text, attention_mask=torch.ones_like(text), min_new_tokens=new, max_new_tokens=new, do_sample=False
            )
        with torch.no_grad():
            seconds, _ = _timed(lambda: float(run().shape[1]), 2, device)
    finally:
        shutdown()
    tokens = sizes.samples * new
    sizes_of = {"layers": model.llm.num_layers, "prompt_rows": rows, "new_tokens": tokens}
    return sizes_of | _figures(seconds, tokens, device)


def _their_decoder(model: ParrotConfig) -> Any:
    """Qwen2 of transformers with the same layers and random weights.

    Raises:
        Unavailable: transformers is missing.
    """
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        raise Unavailable(f"transformers: {error}") from error
    llm = model.llm
    config = Qwen2Config(
        hidden_size=llm.hidden_size,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_attention_heads,
        num_key_value_heads=llm.num_query_groups,
        intermediate_size=llm.ffn_hidden_size,
        vocab_size=llm.vocab_size,
        max_position_embeddings=llm.max_position_embeddings,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _timed(run: Callable[[], float], times: int, device: torch.device) -> tuple[float, list[float]]:
    """Median seconds of `times` runs after one that warms up, and what the runs returned."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    results, seconds = [run()], []
    for _ in range(times):
        start = time.perf_counter()
        results.append(run())  # (its result is a number on the host: it waits for the GPU)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2], results


def _figures(seconds: float, tokens: int, device: torch.device) -> dict[str, Any]:
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_memory_gb": peak}
