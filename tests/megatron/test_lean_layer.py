"""Steps over a paged cache the short way: what Megatron's modules give, for each kind of layer and unknown part."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from parrot_sys.megatron.config import to_transformer_config
from parrot_sys.megatron.decoder import Decoder, layer_spec
from parrot_sys.megatron.lean_layer import LeanLayer
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.models.llm import LLMConfig
from parrot_sys.modules.lora import LoRAConfig
from tests.megatron.decoder_reference import LLAMA, QWEN3, TINY
from tests.megatron.pages import Pages

GROUPED = dataclasses.replace(TINY, num_query_groups=1)
LORA = LoRAConfig(rank=2, targets=("q_proj", "o_proj", "down_proj"))


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


def build(llm: LLMConfig, lora: LoRAConfig | None = None) -> Decoder:
    torch.manual_seed(0)
    config = to_transformer_config(llm, ParallelConfig(), dtype=torch.float32)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    decoder = Decoder(
        llm, config, pg_collection=groups, spec_of_layer=lambda _: layer_spec(lora=lora, qk_norm=llm.qk_norm)
    )
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)  # no update and no bias is zero
    return decoder.eval()


@torch.no_grad()
def walk(decoder: Decoder, steps: list[list[int]]) -> list[Tensor]:
    """Logits of steps that have so many rows of each of three requests."""
    generator, pages, found = torch.Generator().manual_seed(1), Pages(3, 24), []
    done = torch.zeros(3, dtype=torch.int64)
    for counts in steps:
        ids = torch.randint(0, decoder.llm.vocab_size, (sum(counts),), generator=generator)
        positions = torch.cat([torch.arange(count) + start for count, start in zip(counts, done, strict=True)])
        bounds = torch.tensor([0, *counts]).cumsum(0).int()
        found.append(decoder(decoder.embed(ids), positions, bounds, max(counts), paged=pages.rows(counts)))
        done += torch.tensor(counts)
    return found


@pytest.mark.parametrize(
    ("llm", "lora"),
    [(TINY, None), (LLAMA, None), (QWEN3, None), (GROUPED, None), (TINY, LORA)],
    ids=["biases", "llama", "norms of queries and keys", "one key head", "low-rank updates"],
)
@settings(max_examples=5, deadline=None)
@given(steps=st.lists(st.lists(st.integers(1, 5), min_size=3, max_size=3), min_size=1, max_size=4))
def test_a_step_is_that_of_the_modules(llm: LLMConfig, lora: LoRAConfig | None, steps: list[list[int]]) -> None:
    decoder = build(llm, lora)
    ours = walk(decoder, steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeanLayer, "_goes_lean", lambda *_: False)
        theirs = walk(decoder, steps)
    for own, other in zip(ours, theirs, strict=True):
        # Sums of 64 terms in another order, in two layers and a norm each.
        torch.testing.assert_close(own, other, atol=2e-5 * float(other.abs().max()), rtol=0)


def test_modules_are_called_where_something_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way calls neither attention nor MLP; a hook is never passed by, nor is training."""
    decoder, called = build(TINY), []
    for kind in (SelfAttention, MLP):
        real = kind.forward
        monkeypatch.setattr(kind, "forward", lambda *a, real=real, **k: called.append(real) or real(*a, **k))
    walk(decoder, [[3, 1, 2], [1, 1, 1]])
    assert not called
    seen: list[torch.Size] = []
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "input_layernorm"):
        part = decoder.layers[0].get_submodule(name)
        part.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    walk(decoder, [[3, 1, 2]])
    assert len(seen) == 4
    assert not called
    decoder.train()
    walk(decoder, [[3, 1, 2]])
    assert len(called) == 2 * len(decoder.layers)


def test_new_weights_count_at_once() -> None:
    """Nothing of the weights is kept from step to step."""
    decoder = build(TINY)
    before = walk(decoder, [[2, 2, 2]])
    with torch.no_grad():
        decoder.layers[0].mlp.linear_fc2.weight.mul_(2)
        decoder.layers[1].self_attention.linear_qkv.weight.data = decoder.layers[1].self_attention.linear_qkv.weight * 2
    after = walk(decoder, [[2, 2, 2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeanLayer, "_goes_lean", lambda *_: False)
        (wanted,) = walk(decoder, [[2, 2, 2]])
    torch.testing.assert_close(after[0], wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)
    assert not torch.allclose(before[0], wanted, atol=1e-3)
