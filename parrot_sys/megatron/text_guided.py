"""Text-guided routing of visual rows in other people's Megatron models: `TextGuidedMoE` between projector and decoder.

`add_text_guidance` adds it to a finished model of LLaVA's kind and changes nothing else: no class, no checkpoint key.
Models whose code is at hand build `text_guided_spec` like any other module and call it with what it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parrot_sys.errors import ConfigError, DataError
from parrot_sys.modules.text_guided_moe import RoutingOutput, TextGuidedMoE, TextGuidedMoEConfig

# b samples, s tokens of each (one marker an image), n images or tiles, V rows of each, G guiding tokens, H hidden_size


@dataclass(frozen=True, kw_only=True, slots=True)
class TextGuidance:
    """Which tokens of a batch guide the routing of which image."""

    rows: Tensor  # int64 [G], positions in the flattened [b * s] tokens, sample by sample
    start: Tensor  # int64 [n], first of the guiding tokens of each image, counted in `rows`
    end: Tensor  # int64 [n], one past the last


def text_guidance(
    input_ids: Tensor,
    *,
    image_token_id: int,
    loss_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    tiles: Tensor | None = None,
) -> TextGuidance:
    """The guiding tokens of each image: the text of its sample that is no answer, as the released Parrot does it.

    Looks at values on the host (once), so best called where the batch still is on the CPU.

    Args:
        input_ids: int [b, s], one `image_token_id` for each image, in the order of the images.
        image_token_id: marks an image.
        loss_mask: [b, s], not 0 where the NEXT token is an answer (Megatron's loss mask); without it every text token
            guides, which is right for prompts.
        text_mask: bool [b, s], False for padding.
        tiles: int [number of images], tiles that each image was cut into; each is routed by itself. None for one each.
    """
    guiding = input_ids != image_token_id
    if loss_mask is not None:
        guiding = guiding.clone()
        guiding[:, 1:] &= loss_mask[:, :-1] == 0
    if text_mask is not None:
        guiding = guiding & text_mask
    ends = guiding.sum(dim=1).cumsum(0)
    sample = (input_ids == image_token_id).nonzero()[:, 0]
    if tiles is not None:
        tiles = torch.as_tensor(tiles, device=sample.device)
        if len(tiles) != len(sample):
            raise DataError(f"the batch has {len(sample)} image markers, but tiles for {len(tiles)} images")
        sample = sample.repeat_interleave(tiles)
    end = ends[sample]
    return TextGuidance(rows=guiding.flatten().nonzero()[:, 0], start=end - guiding.sum(dim=1)[sample], end=end)


class TextGuidedLayer(MegatronModule):
    """`TextGuidedMoE` in Megatron's layout (rows first) and with its configuration.

    Every tensor-parallel rank holds all experts and computes alike; data-parallel ranks reduce its gradients like those
    of any other replicated module. After a forward pass `routing` holds what the router decided, and the auxiliary
    losses, already times their coefficients: means over the images of this micro-batch, to be added to its loss.
    """

    routing: RoutingOutput | None = None

    def __init__(
        self,
        config: TransformerConfig,
        moe: TextGuidedMoEConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        """
        Args:
            config: of the decoder that the rows go to; gives `hidden_size` and dtype.
            moe: experts, routing and residual.
            pg_collection: process groups; not needed.

        Raises:
            ConfigError: auxiliary losses under pipeline parallelism, where the loss is formed on another stage.
        """
        super().__init__(config=config)
        if config.pipeline_model_parallel_size > 1 and (moe.aux_loss_coeff or moe.z_loss_coeff):
            raise ConfigError(
                "auxiliary losses of text-guided routing belong to the first pipeline stage, the loss to the last: "
                "set moe.aux_loss_coeff and moe.z_loss_coeff to 0, or pipeline_model_parallel_size to 1"
            )
        self.moe = TextGuidedMoE(moe, config.hidden_size, dtype=config.params_dtype)

    def forward(self, visual: Tensor, text: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Visual rows after the experts, [V, n, H].

        Args:
            visual: [V, n, H], projected; row 0 of each image is its CLS row.
            text: [G, H], word embeddings of the guiding tokens.
            start: int [n], see `TextGuidance`.
            end: int [n].
        """
        features, self.routing = self.moe(visual.transpose(0, 1), text, start, end)
        return features.transpose(0, 1).contiguous()


def text_guided_spec(moe: TextGuidedMoEConfig) -> ModuleSpec:
    """Spec of `TextGuidedLayer`; `build_module(spec, config=...)` makes it."""
    return ModuleSpec(module=TextGuidedLayer, params={"moe": moe})


Arguments = Mapping[str, Any]
"""Arguments of a model's forward pass by name."""


def add_text_guidance(
    model: nn.Module,
    spec: ModuleSpec | TextGuidedMoEConfig,
    *,
    projection: str = "vision_projection",
    word_embeddings: str = "language_model.embedding.word_embeddings",
    guidance: Callable[[Arguments], tuple[Tensor, TextGuidance]] | None = None,
) -> TextGuidedLayer | None:
    """Puts text-guided routing behind the projection of a finished model, before its data-parallel wrapper.

    The layer becomes the submodule `text_guided`; all other parameters and checkpoint keys stay as they are.

    Args:
        model: like Megatron's `LLaVAModel`: its forward pass calls a projection that returns [V, n, H], and a word
            embedding. Build `LLaVAModel` with `drop_vision_class_token=False`, so that row 0 is the CLS row.
        spec: from `text_guided_spec`, or the configuration.
        projection: name of the projection in `model`.
        word_embeddings: name of the `VocabParallelEmbedding` in `model`.
        guidance: from the arguments of the model's forward pass to its token ids [b, s] and guidance; by default those
            of `LLaVAModel` (`input_ids`, `loss_mask`, `num_image_tiles`, `image_token_index`).

    Returns:
        The layer; None on pipeline stages that have no projection.

    Raises:
        ConfigError: the model has no such module, or one that cannot serve.
    """
    projector = _submodule(model, projection)
    if projector is None:
        return None
    embedding = _submodule(model, word_embeddings)
    if getattr(embedding, "reduce_scatter_embeddings", False):
        raise ConfigError(
            f"{word_embeddings} scatters its rows over the tensor-parallel ranks, but routing needs all of them: "
            "build the language model with scatter_embedding_sequence_parallel=False"
        )
    if embedding is None:
        raise ConfigError(f"{type(model).__name__}.{word_embeddings} is None on this pipeline stage: text guides here")
    if isinstance(spec, TextGuidedMoEConfig):
        spec = text_guided_spec(spec)
    layer = build_module(spec, config=model.config)
    layer.to(next(projector.parameters()).device)
    model.text_guided = layer
    signature, current = inspect.signature(model.forward), dict[str, Any]()
    choose = guidance or (lambda arguments: _llava_guidance(model, arguments))

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current.update(signature.bind(*args, **kwargs).arguments)

    def route(_: nn.Module, __: Any, visual: Any) -> Any:
        if not current:
            raise DataError(f"{projection} was called outside the forward pass of {type(model).__name__}: no guidance")
        rows = visual[0] if isinstance(visual, tuple) else visual
        ids, spans = choose(current)
        if rows.shape[1] != len(spans.start):
            raise DataError(f"the projection gave rows of {rows.shape[1]} images, the tokens mark {len(spans.start)}")
        text = embedding(ids.flatten().index_select(0, spans.rows.to(ids.device)))
        routed = layer(rows, text, spans.start.to(ids.device), spans.end.to(ids.device))
        return (routed, *visual[1:]) if isinstance(visual, tuple) else routed

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.register_forward_hook(lambda *_: current.clear(), always_call=True)
    projector.register_forward_hook(route)
    return layer


def _llava_guidance(model: nn.Module, arguments: Arguments) -> tuple[Tensor, TextGuidance]:
    """From the arguments of `LLaVAModel.forward`."""
    ids, marker = arguments["input_ids"], arguments.get("image_token_index")
    own: Any = model.image_token_index
    spans = text_guidance(
        ids,
        image_token_id=own if marker is None else marker,
        loss_mask=arguments.get("loss_mask"),
        tiles=arguments.get("num_image_tiles"),
    )
    return ids, spans


def _submodule(model: nn.Module, name: str) -> Any:
    found: Any = model
    for part in name.split("."):
        if found is None:
            return None
        if not hasattr(found, part):
            has = ", ".join(child for child, _ in found.named_children())
            raise ConfigError(f"{type(found).__name__} has no {part!r} (asked for {name!r}); it has {has or 'none'}")
        found = getattr(found, part)
    return found
