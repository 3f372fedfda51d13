"""The decoder against transformers' models of each family: logits, losses, all gradients; packs, layouts, modes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from parrot_sys.megatron.config import Recompute, to_transformer_config
from parrot_sys.megatron.decoder import Decoder
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.models.llm import LLMConfig
from parrot_sys.testing.distributed import run_distributed
from tests.megatron.decoder_reference import LLAMA, QWEN3, TINY, build_reference, copy_weights, megatron_tensors
from tests.megatron.pages import Pages

LENGTHS = [5, 9, 1, 17, 3]


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


def _decoder(
    llm: LLMConfig,
    parallel: ParallelConfig | None = None,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
) -> Decoder:
    config = to_transformer_config(llm, parallel or ParallelConfig(), dtype=dtype, recompute=recompute)
    return Decoder(llm, config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())


@dataclasses.dataclass
class Pack:
    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    label_rows: Tensor
    targets: Tensor


def _pack(lengths: list[int], vocab_size: int = TINY.vocab_size) -> Pack:
    generator = torch.Generator().manual_seed(3)
    rows = sum(lengths)
    label_rows = torch.arange(0, rows, 2)
    return Pack(
        ids=torch.randint(0, vocab_size, (rows,), generator=generator),
        positions=torch.cat([torch.arange(n) for n in [*lengths, 0]]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths, default=0),
        label_rows=label_rows,
        targets=torch.randint(0, vocab_size, label_rows.shape, generator=generator),
    )


def _losses(decoder: Decoder, pack: Pack) -> Tensor:
    embeddings = decoder.embed(pack.ids)
    return decoder(
        embeddings,
        pack.positions,
        pack.cu_seqlens,
        pack.max_seqlen,
        label_rows=pack.label_rows,
        targets=pack.targets,
    )


def _reference_logits(reference: torch.nn.Module, pack: Pack) -> Tensor:
    bounds = pack.cu_seqlens.tolist()
    return torch.cat([reference(pack.ids[start:end][None]).logits[0] for start, end in pairwise(bounds)])


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


VARIANTS = {
    "grouped": TINY,
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True),
    "multi-head": dataclasses.replace(TINY, num_query_groups=4),
    "qwen3": QWEN3,
    "llama": LLAMA,
    "one-group": dataclasses.replace(TINY, num_query_groups=1, rope_base=1_000_000.0, norm_eps=1e-3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_losses_and_gradients_match_transformers(variant: str) -> None:
    llm = VARIANTS[variant]
    reference, decoder, pack = build_reference(llm), _decoder(llm), _pack(LENGTHS)
    copy_weights(llm, reference, decoder)
    wanted = _reference_logits(reference, pack)
    logits = decoder(decoder.embed(pack.ids), pack.positions, pack.cu_seqlens, pack.max_seqlen)
    assert _relative(logits, wanted) < 1e-5

    wanted_losses = F.cross_entropy(wanted[pack.label_rows], pack.targets, reduction="none")
    losses = _losses(decoder, pack)
    assert losses.dtype == torch.float32
    assert _relative(losses, wanted_losses) < 1e-5
    wanted_losses.sum().backward()
    losses.sum().backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    got = {name: p.grad for name, p in decoder.named_parameters()}
    for name, gradient in megatron_tensors(llm, gradients):
        assert _relative(got[name], gradient) < 2e-5, name


def test_packed_samples_do_not_see_each_other() -> None:
    decoder, pack = _decoder(TINY), _pack(LENGTHS)
    together = decoder(decoder.embed(pack.ids), pack.positions, pack.cu_seqlens, pack.max_seqlen)
    bounds = pack.cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        alone = _pack([end - start])
        alone.ids = pack.ids[start:end]
        logits = decoder(decoder.embed(alone.ids), alone.positions, alone.cu_seqlens, end - start)
        assert _relative(together[start:end], logits) < 1e-5


def test_logits_of_chosen_rows() -> None:
    decoder, pack = _decoder(TINY), _pack(LENGTHS)
    last = pack.cu_seqlens[1:].long() - 1
    args = (decoder.embed(pack.ids), pack.positions, pack.cu_seqlens, pack.max_seqlen)
    assert _relative(decoder(*args, logits_rows=last), decoder(*args)[last]) < 1e-6


def test_recompute_gives_the_same_gradients() -> None:
    pack, gradients = _pack(LENGTHS), []
    for recompute in ("none", "full"):
        torch.manual_seed(5)
        decoder = _decoder(TINY, recompute=recompute)
        _losses(decoder, pack).sum().backward()
        gradients.append([p.grad for p in decoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_empty_pack_reaches_every_parameter() -> None:
    decoder = _decoder(TINY)
    losses = _losses(decoder, _pack([]))
    assert losses.shape == (0,)
    losses.sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_negative_ids_are_placeholders() -> None:
    decoder = _decoder(TINY)
    embeddings = decoder.embed(torch.tensor([-200, 4, -200]))
    assert torch.equal(embeddings[1], decoder.embedding.word_embeddings.weight[4])


@pytest.mark.parametrize("variant", ["grouped", "multi-head", "qwen3", "llama"])
def test_decoding_with_cache_equals_full_recomputation(variant: str) -> None:
    llm = VARIANTS[variant]
    decoder, steps, lengths = _decoder(llm).eval(), 6, [4, 9, 1]
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(0, llm.vocab_size, (n + steps,), generator=generator) for n in lengths]
    pages = Pages(len(lengths), max(lengths) + steps)
    with torch.no_grad():
        wanted = [
            decoder(decoder.embed(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)]).int(), len(ids))
            for ids in samples
        ]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        prompt = torch.cat([ids[:n] for ids, n in zip(samples, lengths, strict=True)])
        positions = torch.cat([torch.arange(n) for n in lengths])
        decoder(decoder.embed(prompt), positions, cu_seqlens, max(lengths), paged=pages.rows(lengths))
        alive = [0, 1, 2]
        for step in range(steps):
            if step == 3:  # the first request is done
                alive = [1, 2]
                pages.keep(alive)
            ids = torch.stack([samples[s][lengths[s] + step] for s in alive])
            cu_seqlens = torch.arange(len(alive) + 1, dtype=torch.int32)
            positions = pages.lengths
            logits = decoder(decoder.embed(ids), positions, cu_seqlens, 1, paged=pages.rows([1] * len(alive)))
            for row, s in enumerate(alive):
                assert _relative(logits[row], wanted[s][lengths[s] + step]) < 1e-5


@pytest.mark.parametrize("variant", ["grouped", "llama"])
def test_prompts_in_pieces_beside_answers(variant: str) -> None:
    """Rows of requests in any pieces, several requests in a step, are rows of the whole requests."""
    decoder, lengths = _decoder(VARIANTS[variant]).eval(), [7, 12, 5]
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(0, VARIANTS[variant].vocab_size, (n,), generator=generator) for n in lengths]
    pages, done = Pages(3, 12), [0, 0, 0]
    with torch.no_grad():
        wanted = [
            decoder(decoder.embed(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)]).int(), len(ids))
            for ids in samples
        ]
        for counts in ([3, 1, 5], [1, 4, 0], [3, 7, 0]):
            ids = torch.cat([own[start : start + n] for own, start, n in zip(samples, done, counts, strict=True)])
            positions = torch.cat([torch.arange(start, start + n) for start, n in zip(done, counts, strict=True)])
            bounds = torch.tensor([0, *counts]).cumsum(0).int()
            logits = decoder(decoder.embed(ids), positions, bounds, max(counts), paged=pages.rows(counts))
            for s, (start, n) in enumerate(zip(done, counts, strict=True)):
                if n:
                    assert _relative(logits[bounds[s] : bounds[s + 1]], wanted[s][start : start + n]) < 1e-5
            done = [start + n for start, n in zip(done, counts, strict=True)]


def test_bfloat16_is_close_to_float32() -> None:
    reference, pack = build_reference(TINY), _pack(LENGTHS)
    decoder = _decoder(TINY, dtype=torch.bfloat16)
    copy_weights(TINY, reference, decoder)
    in_bfloat16 = build_reference(TINY).to(torch.bfloat16)
    losses = _losses(decoder, pack)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    wanted = F.cross_entropy(_reference_logits(reference, pack)[pack.label_rows], pack.targets, reduction="none")
    theirs = F.cross_entropy(
        _reference_logits(in_bfloat16, pack)[pack.label_rows].float(), pack.targets, reduction="none"
    )
    # Twice the error that the same model in bfloat16 makes elsewhere, plus one rounding of the largest value.
    allowed = 2 * (theirs - wanted).abs().max() + 2**-8 * wanted.abs().max()
    assert (losses - wanted).abs().max() <= allowed
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def _shard(name: str, full: Tensor, rank: int, size: int, gate_up: int) -> Tensor:
    if "linear_proj.weight" in name or "linear_fc2.weight" in name:
        return full.chunk(size, 1)[rank]
    if "linear_fc1.weight" in name:
        return torch.cat([part.chunk(size)[rank] for part in full.split(gate_up)])
    return full.chunk(size)[rank] if "norm" not in name else full


def _tensor_parallel_rank(
    rank: int, size: int, llm: LLMConfig, sequence_parallel: bool, lengths: list[int]
) -> list[float]:
    parallel_state.destroy_model_parallel()
    parallel = ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=sequence_parallel)
    initialize(parallel)
    reference, decoder, pack = build_reference(llm), _decoder(llm, parallel), _pack(lengths)
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, tensor in megatron_tensors(llm, dict(reference.state_dict())):
            parameters[name].copy_(_shard(name, tensor, rank, size, llm.ffn_hidden_size))
    wanted = _reference_logits(reference, pack)
    errors = [_relative(decoder(decoder.embed(pack.ids), pack.positions, pack.cu_seqlens, pack.max_seqlen), wanted)]
    wanted_losses = F.cross_entropy(wanted[pack.label_rows], pack.targets, reduction="none")
    losses = _losses(decoder, pack)
    errors.append(_relative(losses, wanted_losses))
    losses.sum().backward()
    wanted_losses.sum().backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    for name, gradient in megatron_tensors(llm, gradients):
        got = parameters[name].grad
        # Each rank has its own rows or, with norms of queries and keys, its own heads.
        if getattr(parameters[name], "sequence_parallel", False) or ("self_attention" in name and "layernorm" in name):
            torch.distributed.all_reduce(got, group=parallel_state.get_tensor_model_parallel_group())
        errors.append(_relative(got, _shard(name, gradient, rank, size, llm.ffn_hidden_size)))
    parallel_state.destroy_model_parallel()
    return errors


@pytest.mark.parametrize(
    ("variant", "sequence_parallel", "lengths"),
    [
        ("grouped", False, LENGTHS),
        ("grouped", True, LENGTHS),
        ("tied", True, [4, 6]),
        ("qwen3", False, LENGTHS),
        ("qwen3", True, [4, 6]),
    ],  # 35 rows: padded by one
)
def test_tensor_parallel_equals_one_rank(variant: str, sequence_parallel: bool, lengths: list[int]) -> None:
    shutdown()
    for errors in run_distributed(_tensor_parallel_rank, 2, VARIANTS[variant], sequence_parallel, lengths):
        assert max(errors) < 2e-5, errors
