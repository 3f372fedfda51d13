"""Text-guided routing of visual rows in other people's Megatron models: `TextGuidedMoE` between projector and decoder.

`add_text_guidance` adds it to a finished model of LLaVA's kind and changes nothing else: no class, no checkpoint key.
Models whose code is at hand build `text_guided_spec` like any other module and call it with what it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron.embed.guidance import TextGuidance, packed_sample_ids, text_guidance
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.modules.text_guided_moe import RoutingOutput, TextGuidedMoE

# n images or tiles, V rows of each, G guiding tokens, H hidden_size

Query = Literal["cls", "mean"] | int
"""Row of an image that asks the text: row 0 as its CLS row, the mean of all its rows, or the row with this number."""


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
        query: Query = "cls",
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        """
        Args:
            config: of the decoder that the rows go to; gives `hidden_size` and dtype.
            moe: experts, routing and residual.
            query: row of an image that asks the text.
            pg_collection: process groups; not needed.

        Raises:
            ConfigError: auxiliary losses under pipeline parallelism, where the loss is formed on another stage; what
                changes from step to step.
        """
        super().__init__(config=config)
        if query not in ("cls", "mean") and (isinstance(query, str) or query < 0):
            raise ConfigError(f"query must be 'cls', 'mean' or the number of a row, got {query!r}")
        self.query: Query = query
        if config.pipeline_model_parallel_size > 1 and moe.has_losses:
            raise ConfigError(
                "auxiliary losses of text-guided routing belong to the first pipeline stage, the loss to the last: "
                "set the coefficients of moe to 0, or pipeline_model_parallel_size to 1"
            )
        if (moe.expert_bias and moe.bias_update_rate) or moe.router_scale_start is not None:
            raise ConfigError(
                "Megatron's own training does not say when a step begins or ends: set moe.bias_update_rate to 0 and "
                "leave moe.router_scale_start unset, or train with parrot train"
            )
        self.moe = TextGuidedMoE(moe, config.hidden_size, dtype=config.params_dtype)

    def forward(self, visual: Tensor, text: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Visual rows after the experts, [V, n, H].

        Args:
            visual: [V, n, H], projected; unless `query` says otherwise, row 0 of each image is its CLS row.
            text: [G, H], word embeddings of the guiding tokens.
            start: int [n], see `TextGuidance`.
            end: int [n].
        """
        if isinstance(self.query, int) and self.query >= len(visual):
            raise ConfigError(f"query must be a row below {len(visual)}, those of an image here, got {self.query}")
        asking = visual.mean(dim=0) if self.query == "mean" else visual[0 if self.query == "cls" else self.query]
        features, self.routing = self.moe(visual.transpose(0, 1), text, start, end, query=asking)
        return features.transpose(0, 1).contiguous()


def text_guided_spec(moe: TextGuidedMoEConfig, *, query: Query = "cls") -> ModuleSpec:
    """Spec of `TextGuidedLayer`; `build_module(spec, config=...)` makes it."""
    return ModuleSpec(module=TextGuidedLayer, params={"moe": moe, "query": query})


Arguments = Mapping[str, Any]
"""Arguments of a model's forward pass by name."""


_NOT_SAID: Any = object()


def add_text_guidance(
    model: nn.Module,
    spec: ModuleSpec | TextGuidedMoEConfig,
    *,
    pad_token_id: int | None = _NOT_SAID,
    projection: str = "vision_projection",
    word_embeddings: str = "language_model.embedding.word_embeddings",
    guidance: Callable[[Arguments], tuple[Tensor, TextGuidance]] | None = None,
) -> TextGuidedLayer | None:
    """Adds text-guided routing after the projection of a finished model, before its data-parallel wrapper.

    The layer becomes the submodule `text_guided`; all other parameters and checkpoint keys stay as they are.

    Args:
        model: like Megatron's `LLaVAModel`: its forward pass calls a projection that returns [V, n, H], and a word
            embedding.
        spec: from `text_guided_spec`, or the configuration. Without a CLS row in the model (SigLIP, pixel shuffle,
            `drop_vision_class_token=True`) it must say which row asks: `text_guided_spec(config, query="mean")`.
        pad_token_id: id that pads the samples at their ends, which guides nothing; None where none does. Must be said
            unless `guidance` is given.
        projection: name of the projection in `model`.
        word_embeddings: name of the `VocabParallelEmbedding` in `model`.
        guidance: from the arguments of the model's forward pass to its token ids [b, s] and guidance; by default those
            of `LLaVAModel` (`input_ids`, `loss_mask`, `num_image_tiles`, `image_token_index`, `packed_seq_params`).

    Returns:
        The layer; None on pipeline stages that have no projection, or one that takes no part in the forward pass.

    Raises:
        ConfigError: the model has no such module, or one that cannot serve.
    """
    if guidance is None:
        _check_images_are_told_apart(model)
    projector = _submodule(model, projection)
    if projector is None or not _embeds(model, word_embeddings):
        return None
    embedding = _guiding_embedding(model, word_embeddings, projection)
    if guidance is None and pad_token_id is _NOT_SAID:
        raise ConfigError(
            "add_text_guidance needs pad_token_id, since padding must not guide the routing: give the id that pads "
            "your samples, or None if none does"
        )
    if isinstance(spec, TextGuidedMoEConfig):
        spec = text_guided_spec(spec)
    layer = build_module(spec, config=model.config)
    _check_query(model, layer)
    layer.to(next(projector.parameters()).device)
    model.text_guided = layer
    _register_hooks(
        model,
        projection,
        projector,
        embedding,
        layer,
        guidance or (lambda call: _llava_guidance(model, call, pad_token_id)),
    )
    return layer


def _check_images_are_told_apart(model: nn.Module) -> None:
    """Refuses models whose tokens do not tell images apart.

    Raises:
        ConfigError: every row of an image has a placeholder of its own, so that tokens do not tell images apart.
    """
    if getattr(model, "special_token_ids", None) is not None:
        raise ConfigError(
            f"{type(model).__name__} has a placeholder for each row of an image (special_token_ids, as MIMO's models), "
            "and its tokens do not say which rows are one image: route inside your model (text_guided_spec), or give "
            "guidance= and a projection that returns [V, n, H]"
        )


def _check_query(model: nn.Module, layer: TextGuidedLayer) -> None:
    """Refuses a query that the model does not have.

    Raises:
        ConfigError: row 0 of an image is to ask the text and is none of the whole image.
    """
    if layer.query == "cls" and (reason := _why_no_cls_row(model)):
        raise ConfigError(
            f"row 0 of an image is no CLS row in this model, since {reason}: build it with a class token that is kept, "
            'or say which row asks the text, text_guided_spec(config, query="mean")'
        )


def _guiding_embedding(model: nn.Module, word_embeddings: str, projection: str) -> nn.Module:
    """The word embedding beside the projection.

    Raises:
        ConfigError: it is on another pipeline stage, or gives each rank a part of the rows.
    """
    embedding = _submodule(model, word_embeddings)
    if embedding is None:
        raise ConfigError(
            f"{type(model).__name__}.{word_embeddings} is None where {projection} is: the text guides the routing "
            "of the projected rows, so both must be on the same pipeline stage"
        )
    if getattr(embedding, "reduce_scatter_embeddings", False):
        raise ConfigError(
            f"{word_embeddings} scatters its rows over the tensor-parallel ranks, but routing needs all of them: "
            "build the language model with scatter_embedding_sequence_parallel=False"
        )
    return embedding


def _register_hooks(
    model: nn.Module,
    projection: str,
    projector: nn.Module,
    embedding: nn.Module,
    layer: TextGuidedLayer,
    choose: Callable[[Arguments], tuple[Tensor, TextGuidance]],
) -> None:
    """Lets `layer` route what `projector` returns, guided by the arguments of the model's forward pass."""
    signature, current = inspect.signature(model.forward), dict[str, Any]()

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current.update(signature.bind(*args, **kwargs).arguments)

    def route(_: nn.Module, __: Any, visual: Any) -> Any:
        if not current:
            raise DataError(f"{projection} was called outside the forward pass of {type(model).__name__}: no guidance")
        rows = visual[0] if isinstance(visual, tuple) else visual
        if rows.dim() != 3:
            raise DataError(
                f"{projection} must return rows [V, n, H] of n images, got {list(rows.shape)}: which rows are one "
                "image is not said"
            )
        ids, spans = choose(current)
        count, marked = rows.shape[1], len(spans.start)
        if count != marked:
            each = "; one marker is wanted for each image, not for each of its rows" * (marked == count * len(rows))
            raise DataError(f"the projection gave rows of {count} images, the tokens mark {marked}{each}")
        text = embedding(ids.flatten().index_select(0, spans.rows.to(ids.device)))
        routed = layer(rows, text, spans.start.to(ids.device), spans.end.to(ids.device))
        return (routed, *visual[1:]) if isinstance(visual, tuple) else routed

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.register_forward_hook(lambda *_: current.clear(), always_call=True)
    projector.register_forward_hook(route)


def _llava_guidance(model: nn.Module, arguments: Arguments, pad_token_id: int | None) -> tuple[Tensor, TextGuidance]:
    """From the arguments of `LLaVAModel.forward`."""
    ids, marker = arguments["input_ids"], arguments.get("image_token_index")
    own: Any = model.image_token_index
    marker = own if marker is None else marker
    tiles, packs, sample_ids = arguments.get("num_image_tiles"), arguments.get("packed_seq_params"), None
    if packs is not None and packs.cu_seqlens_q is not None and packs.qkv_format != "sbhd":
        rows: Any = model.img_seq_len
        sample_ids = packed_sample_ids(ids, packs, image_token_id=marker, rows_per_image=rows, tiles=tiles)
    spans = text_guidance(
        ids,
        image_token_id=marker,
        loss_mask=arguments.get("loss_mask"),
        pad_token_id=pad_token_id,
        sample_ids=sample_ids,
        tiles=tiles,
    )
    return ids, spans


def _why_no_cls_row(model: nn.Module) -> str | None:
    """Reason why row 0 of a projected image is no CLS row; None if it is one, or the model does not tell."""
    if getattr(model, "_drop_vision_class_token", False):
        return "drop_vision_class_token=True drops it"
    if getattr(model, "_pixel_shuffle", False):
        return "pixel_shuffle=True merges rows"
    tower = getattr(model, "vision_model", None)
    if not getattr(tower, "add_class_token", True):
        return f"{type(tower).__name__} has no class token"
    return None


def _embeds(model: nn.Module, word_embeddings: str) -> bool:
    """Whether this pipeline stage embeds tokens: False below a module that says `pre_process=False`."""
    found: Any = model
    for part in (*word_embeddings.split("."), None):
        if getattr(found, "pre_process", True) is False:
            return False
        if part is None or not hasattr(found, part):
            return True
        found = getattr(found, part)
    return True


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
