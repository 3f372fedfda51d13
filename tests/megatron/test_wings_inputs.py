"""Wings' learners in Megatron's own `GPTModel`, by spec: against plain torch, and on two tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.attention import CrossAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron import learner_inputs, with_learners, with_norms
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.systems.export import released_tensors
from parrot_sys.systems.wings.config import WingsConfig
from parrot_sys.testing.distributed import run_distributed
from tests.megatron import gpt_training as gpt
from tests.megatron.llava import make_batch as llava_batch
from tests.megatron.llava import make_llava
from tests.megatron.wings_models import QWEN, assert_close, build
from tests.megatron.wings_reference import Sequence, WingsReference

LLM = replace(QWEN.llm, vocab_size=54)
WINGS = replace(QWEN.wings, layers=(0, 2))
PARROT = replace(QWEN, wings=WINGS, llm=LLM)
SEQ, IMAGE = 12, -200


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


def make_config(parallel: ParallelConfig | None = None, **changes: Any) -> TransformerConfig:
    """The sizes of `PARROT.llm`, as one would write them down for Megatron."""
    parallel = parallel or ParallelConfig()
    fields: dict[str, Any] = {
        "num_layers": LLM.num_layers,
        "hidden_size": LLM.hidden_size,
        "num_attention_heads": LLM.num_attention_heads,
        "num_query_groups": LLM.num_query_groups,
        "ffn_hidden_size": LLM.ffn_hidden_size,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "add_qkv_bias": True,
        "layernorm_epsilon": LLM.norm_eps,
        **gpt.ON_CPU,
        **gpt.LLAMA_STYLE,
        "hetereogenous_dist_checkpoint": True,
    }
    return TransformerConfig(**{**fields, **changes})


def make_gpt(config: TransformerConfig) -> GPTModel:
    """An unmodified GPTModel on Megatron's own layer spec, with learners in two of its three layers."""
    spec = with_norms(get_gpt_layer_local_spec(normalization="RMSNorm"), LLM.num_layers)
    return GPTModel(
        config=config,
        transformer_layer_spec=with_learners(spec, WINGS, rope_base=10_000.0),
        vocab_size=LLM.vocab_size,
        max_sequence_length=64,
        position_embedding_type="rope",
        rotary_base=10_000,
        scatter_embedding_sequence_parallel=False,
    )


def make_batch() -> tuple[Tensor, Tensor]:
    """Ids [3, SEQ], with `IMAGE` where rows of images are: one image, none, two; and these rows [R, H]."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, LLM.vocab_size, (3, SEQ), generator=generator)
    ids[0, 5:9] = ids[2, 1:5] = ids[2, 7:11] = IMAGE
    return ids, torch.randn(12, LLM.hidden_size, generator=generator)


def embed(model: GPTModel, ids: Tensor, visual: Tensor) -> Tensor:
    """[s, b, H], images in place."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    rows = model.embedding(ids.clamp(min=0), positions).transpose(0, 1)
    return rows.masked_scatter((ids == IMAGE)[..., None], visual).transpose(0, 1).contiguous()


def logits(model: GPTModel, ids: Tensor, visual: Tensor, **more: Any) -> Tensor:
    inputs = learner_inputs(embed(model, ids, visual), ids == IMAGE, WINGS, model.config, **more)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    output: Tensor = model(ids.clamp(min=0), positions, None, **inputs)
    return output


def test_a_gpt_with_learners_is_the_plain_model() -> None:
    ours = build(PARROT)
    model = make_gpt(make_config()).eval()
    # Same names, in a model that knows nothing of ours.
    model.load_state_dict(ours.decoder.state_dict())
    ids, visual = make_batch()
    plain = WingsReference(dict(released_tensors(ours)), PARROT, torch.zeros(4, LLM.hidden_size))
    wanted = plain.logits(
        [Sequence(ids=row, visual=rows) for row, rows in zip(ids, visual.split((4, 0, 8)), strict=True)]
    )
    weights: dict[int, Tensor] = {}
    with torch.no_grad():
        got = logits(model, ids, visual, weights=weights)
        assert_close(list(got), wanted)
        assert sorted(weights) == [1, 3]
        # The same samples, cut short at their end, as one pack.
        packed = torch.cat((ids[0, :9], ids[1, :4], ids[2]))[None]
        bounds = torch.tensor([0, 9, 13, 25], dtype=torch.int32)
        pack = logits(model, packed, visual, cu_seqlens=bounds)[0].split((9, 4, 12))
        assert_close(list(pack), [wanted[0][:9], wanted[1][:4], wanted[2]])


def test_all_gradients_are_those_of_our_own_decoder() -> None:
    ours = build(PARROT)
    model = make_gpt(make_config())
    model.load_state_dict(ours.decoder.state_dict())
    ids, visual = make_batch()
    targets = torch.randint(0, LLM.vocab_size, ids.shape, generator=torch.Generator().manual_seed(9))
    own_rows, visual = visual.clone().requires_grad_(), visual.requires_grad_()
    F.cross_entropy(logits(model, ids, visual).flatten(0, 1), targets.flatten()).backward()
    decoder = ours.decoder
    rows = decoder.embed(ids.flatten()).masked_scatter((ids.flatten() == IMAGE)[:, None], own_rows)
    inputs = learner_inputs(rows.unsqueeze(1), (ids == IMAGE).view(1, -1), WINGS, model.config, cu_seqlens=_bounds())
    positions = torch.arange(SEQ).repeat(3)
    losses = decoder(
        rows,
        positions,
        _bounds(),
        SEQ,
        label_rows=torch.arange(3 * SEQ),
        targets=targets.flatten(),
        memory=inputs["extra_block_kwargs"]["context"],
        memory_plan=inputs["packed_seq_params"].memory,
    )
    losses.mean().backward()
    wanted = {name: p.grad for name, p in decoder.named_parameters()} | {"visual": own_rows.grad}
    got = {name: p.grad for name, p in model.named_parameters()} | {"visual": visual.grad}
    assert wanted.keys() == got.keys()
    floor = 1e-3 * max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).abs().max()) < 2e-5 * max(float(gradient.abs().max()), floor), name


def _bounds() -> Tensor:
    return torch.arange(0, 4 * SEQ, SEQ, dtype=torch.int32)


def _gradients(rank: int, size: int, parallel: ParallelConfig, folder: Path) -> tuple[float, gpt.Run]:
    initialize(parallel)
    model = make_gpt(make_config(parallel))
    gpt.load(model, folder)
    ids, visual = make_batch()
    rows = embed(model, ids, visual)
    group = parallel_state.get_tensor_model_parallel_group()
    if parallel.sequence_parallel:
        rows = scatter_to_sequence_parallel_region(rows, group=group)
    inputs = learner_inputs(rows, ids == IMAGE, WINGS, model.config)
    labels = ids.clamp(min=0).roll(-1, 1)
    loss = model(ids.clamp(min=0), torch.arange(SEQ).expand_as(ids), None, labels=labels, **inputs).mean()
    loss.backward()
    for parameter in model.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if getattr(parameter, "sequence_parallel", False):  # what `finalize_model_grads` does
            torch.distributed.all_reduce(gradient, group=group)
        parameter.main_grad = gradient
    return float(loss), gpt.Run(gradients=gpt.gradients(model))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2-sp"])
def test_two_tensor_parallel_ranks_equal_one(sequence_parallel: bool, tmp_path: Path) -> None:
    model = make_gpt(make_config())
    model.load_state_dict(build(PARROT).decoder.state_dict())
    gpt.save(model, tmp_path)
    shutdown()  # ranks join groups of their own
    ((loss, wanted),) = run_distributed(_gradients, 1, ParallelConfig(), tmp_path)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    ranks = run_distributed(_gradients, 2, parallel, tmp_path)
    got, whole = gpt.assemble([run for _, run in ranks]), gpt.assemble([wanted])
    assert got.keys() == whole.keys()
    floor = 1e-3 * max(abs(gradient).max() for gradient in whole.values())
    for key, gradient in whole.items():
        assert abs(got[key] - gradient).max() < 1e-5 * max(abs(gradient).max(), floor), key
    np.testing.assert_allclose([each for each, _ in ranks], loss, rtol=1e-5, equal_nan=False)


def test_recomputed_layers_have_the_same_gradients() -> None:
    ids, visual = make_batch()
    found = []
    for changes in ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}):
        torch.manual_seed(3)
        model = make_gpt(make_config(**changes))
        model.load_state_dict(build(PARROT).decoder.state_dict())
        logits(model, ids, visual).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_llava_model_gains_learners_by_a_hook() -> None:
    wings = WingsConfig(rank=3, router_positions=24, system_prompt_length=0)
    torch.manual_seed(1)
    plain = make_llava()
    torch.manual_seed(2)
    model = make_llava(spec=with_learners(get_gpt_layer_local_spec(), wings, rope_base=10_000.0))
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing, "the learners"
    assert not unexpected
    assert all(".learners." in name for name in missing)
    # Each image takes five rows in the place of its marker.
    visual = torch.zeros(2, 17, dtype=torch.bool)
    visual[0, 2:7] = visual[1, :5] = visual[1, 8:13] = True

    def remember(gpt: GPTModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **learner_inputs(kwargs["decoder_input"], visual, wings, gpt.config)}

    model.language_model.register_forward_pre_hook(remember, with_kwargs=True)
    wanted, mask = plain(**llava_batch())
    new, _ = model(**llava_batch())
    torch.testing.assert_close(new * mask, wanted * mask, rtol=1e-5, atol=1e-6)  # new learners add nothing
    for name, parameter in model.named_parameters():
        if name.endswith("_up"):
            torch.nn.init.normal_(parameter, std=0.3)
    losses, _ = model(**llava_batch())
    assert float(((losses - wanted) * mask).detach().abs().max()) > 1e-2
    (losses * mask).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if ".learners." in name)


def test_what_cannot_serve_is_refused() -> None:
    ids, visual = make_batch()
    model = make_gpt(make_config())
    rows = embed(model, ids, visual)
    with pytest.raises(ConfigError, match="learner_inputs"):
        model(ids.clamp(min=0), torch.arange(SEQ).expand_as(ids), None)
    with pytest.raises(DataError, match=r"is_visual must be \[b, s\]"):
        learner_inputs(rows, (ids == IMAGE)[:, 1:], WINGS, model.config)
    with pytest.raises(DataError, match="at most 48 rows"):
        learner_inputs(rows.view(-1, 1, 24)[:13].repeat(4, 1, 1), torch.zeros(1, 52) > 0, WINGS, model.config)
    with pytest.raises(ConfigError, match="rule"):
        learner_inputs(rows, ids == IMAGE, replace(WINGS, rule="released"), model.config)
    config = make_config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size must be 1, got 2"):
        learner_inputs(rows, ids == IMAGE, WINGS, config)
    with pytest.raises(ConfigError, match="core_attn out of recompute_modules"):
        make_gpt(make_config(recompute_granularity="selective", recompute_modules=["core_attn"]))
    with pytest.raises(ConfigError, match="hetereogenous_dist_checkpoint=True"):
        make_gpt(make_config(hetereogenous_dist_checkpoint=False))
    spec = get_gpt_layer_local_spec()
    with pytest.raises(ConfigError, match="TransformerLayer"):
        with_learners(ModuleSpec(module=torch.nn.Linear), WINGS, rope_base=1e4)
    spec.submodules.self_attention = ModuleSpec(module=CrossAttention)
    with pytest.raises(ConfigError, match="CrossAttention"):
        with_learners(spec, WINGS, rope_base=1e4)
