"""Text-guided routing put into Megatron's own LLaVAModel, against the released rule written out image by image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron import TextGuidedLayer, add_text_guidance, text_guidance, text_guided_spec
from parrot_sys.megatron.embed.text_guided import Query
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.testing.distributed import run_distributed
from tests.megatron.llava import IMAGE, SEQ, VOCAB, make_batch, make_llava, tiny_config
from tests.megatron.parrot_reference import moe_reference

MOE = TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=10)


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


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
    layer = add_text_guidance(guided, MOE, pad_token_id=None)
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
        model,
        text_guided_spec(TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=4, routing="topk", aux_loss_coeff=1)),
        pad_token_id=None,
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
    layer = add_text_guidance(model, MOE, pad_token_id=None)
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
        np.testing.assert_allclose(losses, wanted, rtol=1e-5, equal_nan=False)
        for name, values in parameters.items():
            assert abs(got[name] - values).max() < 1e-5 * abs(values).max(), name


def test_a_model_of_ones_own_says_where_its_guidance_is() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = tiny_config(ParallelConfig())
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
    # A marker for each row of an image, as MIMO's models have them.
    with pytest.raises(DataError, match="the tokens mark 10; one marker is wanted for each image, not for each of its"):
        model(torch.randn(5, 2, 4), torch.tensor([[IMAGE] * 10 + [4, 9]]))
    with pytest.raises(DataError, match=r"must return rows \[V, n, H\] of n images, got \[10, 16\]"):
        model(torch.randn(10, 4), torch.tensor([[IMAGE] * 10 + [4, 9]]))


def test_models_with_mimos_placeholders_are_refused() -> None:
    from megatron.core.models.mimo import MimoModel

    model = MimoModel.__new__(MimoModel)
    torch.nn.Module.__init__(model)
    model.special_token_ids = {"images": IMAGE}
    with pytest.raises(ConfigError, match=r"MimoModel has a placeholder for each row of an image \(special_token_ids"):
        add_text_guidance(model, MOE, pad_token_id=None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drop_vision_class_token": True}, "drop_vision_class_token=True drops it"),
        ({"drop_vision_class_token": True, "pixel_shuffle": True}, "drops it"),
        ({"pixel_shuffle": True}, "pixel_shuffle=True merges rows"),
        ({"vision_model_type": "siglip"}, "CLIPViTModel has no class token"),
    ],
)
def test_a_patch_is_not_taken_for_a_cls_row(options: dict[str, Any], reason: str) -> None:
    model = make_llava(**options)
    with pytest.raises(ConfigError, match=f"row 0 of an image is no CLS row in this model, since .*{reason}"):
        add_text_guidance(model, MOE, pad_token_id=None)
    assert not hasattr(model, "text_guided")
    assert add_text_guidance(model, text_guided_spec(MOE, query="mean"), pad_token_id=None) is not None


@pytest.mark.parametrize("query", ["mean", 2])
def test_the_caller_says_which_row_asks(query: Query) -> None:
    model = make_llava(drop_vision_class_token=True)
    projected: list[Tensor] = []
    model.vision_projection.register_forward_hook(lambda _, __, rows: projected.append(rows.detach()))
    layer = add_text_guidance(model, text_guided_spec(MOE, query=query), pad_token_id=None)
    _loss(model)
    (rows,) = projected
    ids, loss_mask = make_batch()["input_ids"], make_batch()["loss_mask"]
    weight = model.language_model.embedding.word_embeddings.weight
    for image, sample in enumerate((0, 1, 1)):
        prompt = [
            int(t) for t, a in zip(ids[sample], [0, *loss_mask[sample, :-1]], strict=True) if t != IMAGE and not a
        ]
        asking = rows[:, image].mean(0) if query == "mean" else rows[query, image]
        scores = (weight[prompt] @ asking / 16**0.5).softmax(0)
        wanted = (scores @ weight[prompt] @ layer.moe.router_weight.T).softmax(0)
        assert (layer.routing.probs[image] - wanted).abs().max() < 1e-5


def test_what_cannot_serve_is_refused() -> None:
    model = make_llava()
    with pytest.raises(ConfigError, match=r"no 'projector' .*it has .*vision_projection"):
        add_text_guidance(model, MOE, projection="projector")
    model.language_model.embedding.word_embeddings.reduce_scatter_embeddings = True
    with pytest.raises(ConfigError, match="scatter_embedding_sequence_parallel=False"):
        add_text_guidance(model, MOE, pad_token_id=None)
    with pytest.raises(ConfigError, match="needs pad_token_id"):
        add_text_guidance(make_llava(), MOE)
    with pytest.raises(ConfigError, match="must be 'cls', 'mean' or the number of a row, got 'row'"):
        add_text_guidance(make_llava(), text_guided_spec(MOE, query="row"), pad_token_id=None)
    past_the_end = make_llava()
    add_text_guidance(past_the_end, text_guided_spec(MOE, query=5), pad_token_id=None)
    with pytest.raises(ConfigError, match="a row below 5, those of an image here, got 5"):
        _loss(past_the_end)
    model.vision_projection = None
    assert add_text_guidance(model, MOE, pad_token_id=None) is None
    config = tiny_config(ParallelConfig())
    with pytest.raises(ConfigError, match="when a step begins or ends"):
        TextGuidedLayer(config, TextGuidedMoEConfig(routing="topk", expert_bias=True))
    config.pipeline_model_parallel_size = 2
    with pytest.raises(ConfigError, match="first pipeline stage"):
        TextGuidedLayer(config, TextGuidedMoEConfig(aux_loss_coeff=0.1))
