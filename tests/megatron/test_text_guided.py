"""Text-guided routing put into Megatron's own LLaVAModel, against the released rule written out image by image."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal import llava_model
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron import TextGuidedLayer, add_text_guidance, text_guidance, text_guided_spec
from parrot_sys.megatron.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.modules.text_guided_moe import TextGuidedMoEConfig
from parrot_sys.testing.distributed import run_distributed
from tests.megatron.gpt_training import ON_CPU
from tests.megatron.parrot_reference import moe_reference

VOCAB, IMAGE, SEQ = 64, -200, 9
MOE = TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=10)


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


def _config(parallel: ParallelConfig, **fields: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=24,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        **ON_CPU,
        init_method_std=0.2,
        **fields,
    )


def make_llava(parallel: ParallelConfig | None = None, spec: ModuleSpec | None = None) -> torch.nn.Module:
    """Megatron's LLaVAModel with a CLIP tower of five rows an image; `spec` is that of its decoder's layers."""
    parallel = parallel or ParallelConfig()
    torch.manual_seed(3)
    language, vision = _config(parallel), _config(parallel)
    language.language_model_type, vision.vision_model_type = "tiny", "clip"
    tower_spec = get_vit_layer_with_local_spec()
    # Megatron-Core 0.16 has a causal mask there.
    tower_spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    tower = llava_model.CLIPViTModel
    try:
        # Its default norm does not build without Transformer Engine.
        llava_model.CLIPViTModel = lambda *a, **k: tower(*a, ln_pre_impl=WrappedTorchNorm, **k)
        return llava_model.LLaVAModel(
            language,
            spec or get_gpt_layer_local_spec(),
            VOCAB,
            64,
            vision,
            tower_spec,
            False,
            copy.copy(language),
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            img_h=28,
            img_w=28,
            patch_dim=14,
            language_position_embedding_type="rope",
            image_token_index=IMAGE,
        )
    finally:
        llava_model.CLIPViTModel = tower


def make_batch() -> dict[str, Tensor]:
    """Two samples: one image and two, three answer tokens each."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCAB, (2, SEQ), generator=generator)
    ids[0, 2] = ids[1, 0] = ids[1, 4] = IMAGE
    loss_mask = torch.zeros(2, SEQ)
    loss_mask[:, 5:8] = 1
    return {
        "images": torch.randn(3, 3, 28, 28, generator=generator),
        "input_ids": ids,
        "position_ids": torch.arange(SEQ).repeat(2, 1),
        "attention_mask": None,
        "labels": torch.randint(0, VOCAB, (2, SEQ), generator=generator),
        "loss_mask": loss_mask,
    }


def _loss(model: torch.nn.Module, **changes: Any) -> Tensor:
    losses, mask = model(**{**make_batch(), **changes})
    return (losses * mask).sum() / mask.sum()


def _released_rule(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """The same computation by a hook of its own: each image by itself, with the embeddings of its prompt."""
    ids, loss_mask = make_batch()["input_ids"], make_batch()["loss_mask"]

    def route(_: torch.nn.Module, __: Any, rows: Tensor) -> Tensor:
        images = []
        for image, sample in enumerate((0, 1, 1)):
            prompt = [
                int(ids[sample, t])
                for t in range(SEQ)
                if ids[sample, t] != IMAGE and not (t and loss_mask[sample, t - 1])
            ]
            text = model.language_model.embedding.word_embeddings.weight[prompt]
            images.append(moe_reference(state, rows[:, image], text, MOE.residual_weight))
        return torch.stack(images, dim=1)

    model.vision_projection.register_forward_hook(route)


def test_guiding_tokens_are_the_text_that_is_no_answer() -> None:
    ids = torch.tensor([[5, IMAGE, 6, 7, 8], [IMAGE, IMAGE, 3, 0, 0], [1, 2, 3, 4, 5]])
    loss_mask = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]])
    padding = torch.ones_like(ids, dtype=torch.bool)
    padding[1, 3:] = False
    spans = text_guidance(ids, image_token_id=IMAGE, loss_mask=loss_mask, text_mask=padding)
    assert spans.rows.tolist() == [0, 2, 7, 10, 11, 12, 13]
    assert (spans.start.tolist(), spans.end.tolist()) == ([0, 2, 2], [2, 3, 3])
    tiles = text_guidance(ids, image_token_id=IMAGE, tiles=torch.tensor([2, 1, 3]))
    assert tiles.start.tolist() == [0, 0, 4, 4, 4, 4]
    with pytest.raises(DataError, match="3 image markers, but tiles for 2"):
        text_guidance(ids, image_token_id=IMAGE, tiles=torch.tensor([2, 1]))


def test_llava_model_gains_the_released_rule() -> None:
    guided, reference = make_llava(), make_llava()
    plain = set(guided.state_dict())
    layer = add_text_guidance(guided, MOE)
    assert isinstance(layer, TextGuidedLayer)
    added = set(guided.state_dict()) - plain
    assert added == {f"text_guided.moe.{name}" for name in ("router_weight", "w_gate_up", "w_down")}
    assert {key for key in guided.sharded_state_dict() if key.startswith("text_guided.")} == added
    state = {name: p.detach().clone().requires_grad_() for name, p in layer.moe.named_parameters()}
    _released_rule(reference, state)
    loss, wanted = _loss(guided), _loss(reference)
    assert abs(loss.item() - wanted.item()) < 1e-5 * abs(wanted.item())
    assert abs(_loss(make_llava()).item() - wanted.item()) > 1e-3, "routing must matter"
    loss.backward()
    wanted.backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    expected |= {f"text_guided.moe.{name}": p.grad for name, p in state.items()}
    floor = 1e-3 * max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, parameter in guided.named_parameters():
        gradient = expected[name]
        if gradient is None:  # rows of the tower behind the last one that is read
            assert parameter.grad is None
            continue
        error = float((parameter.grad - gradient).abs().max())
        assert error <= 2e-5 * max(float(gradient.abs().max()), floor), name
    assert layer.routing is not None
    assert layer.routing.probs.shape == (3, 3)


def test_auxiliary_losses_are_of_this_micro_batch() -> None:
    model = make_llava()
    layer = add_text_guidance(
        model, text_guided_spec(TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=4, routing="topk", aux_loss_coeff=1))
    )
    _loss(model)
    assert layer is not None
    assert layer.routing is not None
    assert layer.routing.aux_loss is not None
    layer.routing.aux_loss.backward()
    assert float(layer.moe.router_weight.grad.abs().max()) > 0


def _train(rank: int, size: int, parallel: ParallelConfig) -> tuple[list[float], dict[str, np.ndarray]]:
    initialize(parallel)
    model = make_llava(parallel)
    torch.manual_seed(4)
    layer = add_text_guidance(model, MOE)
    assert layer is not None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, {name: p.detach().numpy() for name, p in layer.named_parameters()}


def test_two_tensor_parallel_ranks_equal_one() -> None:
    shutdown()  # ranks join groups of their own
    (wanted, parameters), *_ = run_distributed(_train, 1, ParallelConfig())
    for losses, got in run_distributed(_train, 2, ParallelConfig(tensor_model_parallel_size=2)):
        np.testing.assert_allclose(losses, wanted, rtol=1e-5)
        for name, values in parameters.items():
            assert abs(got[name] - values).max() < 1e-5 * abs(values).max(), name


def test_a_model_of_ones_own_says_where_its_guidance_is() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = _config(ParallelConfig())
            self.words = torch.nn.Embedding(VOCAB, 16)
            self.projector = torch.nn.Linear(4, 16)

        def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
            return self.projector(features)

    model = Model()
    layer = add_text_guidance(
        model,
        MOE,
        projection="projector",
        word_embeddings="words",
        guidance=lambda call: (call["tokens"], text_guidance(call["tokens"], image_token_id=IMAGE)),
    )
    features, tokens = torch.randn(5, 1, 4), torch.tensor([[IMAGE, 4, 9]])
    projected = torch.nn.functional.linear(features[:, 0], model.projector.weight, model.projector.bias)
    wanted = moe_reference(dict(layer.moe.named_parameters()), projected, model.words.weight[[4, 9]], 0.1)
    assert (model(features, tokens=tokens)[:, 0] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    with pytest.raises(DataError, match="rows of 2 images, the tokens mark 1"):
        model(torch.randn(5, 2, 4), tokens)
    with pytest.raises(DataError, match="outside the forward pass of Model"):
        model.projector(features)


def test_what_cannot_serve_is_refused() -> None:
    model = make_llava()
    with pytest.raises(ConfigError, match=r"no 'projector' .*it has .*vision_projection"):
        add_text_guidance(model, MOE, projection="projector")
    model.language_model.embedding.word_embeddings.reduce_scatter_embeddings = True
    with pytest.raises(ConfigError, match="scatter_embedding_sequence_parallel=False"):
        add_text_guidance(model, MOE)
    model.vision_projection = None
    assert add_text_guidance(model, MOE) is None
    config = _config(ParallelConfig())
    config.pipeline_model_parallel_size = 2
    with pytest.raises(ConfigError, match="first pipeline stage"):
        TextGuidedLayer(config, TextGuidedMoEConfig(aux_loss_coeff=0.1))
