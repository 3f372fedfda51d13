"""Work of a model on a micro-batch, from the costs of its parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from parrot_sys.data.batch import PackedBatch
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.cost import Cost
from parrot_sys.systems.decoder_costs import decoder_layer_cost, lora_layer_cost
from parrot_sys.systems.registry import system_of


def costs(model: ParrotConfig, bypass: Collection[str] = ()) -> list[Cost]:
    """Costs of all parts but the vision tower, in the order in which a gradient comes to them last."""
    llm, system = model.llm, system_of(model).costs()
    layers = range(llm.num_layers)
    updates = [lora_layer_cost(llm, model.lora, layer) for layer in layers if model.lora is not None]
    own = _sums(cost for layer in layers for cost in system.layer_costs(model, bypass, layer))
    decoder = _sums(decoder_layer_cost(llm, layer) for layer in layers)
    head = Cost(part="llm", label=2 * llm.hidden_size * llm.vocab_size)
    # Updates begin in the first layer.
    return [*system.image_costs(model, bypass), *_sums(updates), *own, *decoder, head]


def _sums(found: Iterable[Cost]) -> list[Cost]:
    """Costs of all layers together, one for each part (and for what only images cause)."""
    sums: dict[tuple[str, bool], Cost] = {}
    for cost in found:
        key = (cost.part, cost.only_beside_images)
        sums[key] = cost if key not in sums else sums[key] + cost
    return list(sums.values())


def forward_passes(parts: Iterable[Cost], learning: Mapping[str, bool]) -> dict[str, int]:
    """Part -> forward passes that forward and backward pass together cost.

    A part that learns costs three (forward, gradient of inputs, gradient of weights), a frozen part with one that
    learns before it two, a frozen part at the start one.

    Args:
        parts: all parts but the tower, in the order in which a gradient comes to them last.
        learning: part -> whether it learns.
    """
    gradient = learning["vision"]
    passes = {"vision": 3 if gradient else 1}
    for cost in parts:
        passes[cost.part] = 3 if learning[cost.part] else 2 if gradient else 1
        gradient = gradient or learning[cost.part]
    return passes


class FlopCounter:
    """Multiply-adds of a step, times two, as models are usually rated: no recomputation, the causal half of attention.

    A trainable part counts three times its forward pass (forward, gradient of inputs, gradient of weights), a frozen
    part with a trainable one before it twice, a frozen part at the start once.
    """

    def __init__(
        self,
        model: ParrotConfig,
        learning: Mapping[str, bool],
        *,
        bypass: Collection[str] = (),
        cached_features: bool = False,
    ) -> None:
        """
        Args:
            model: sizes.
            learning: part -> whether it learns.
            bypass: parts that are passed by.
            cached_features: images come as features, so that the vision tower does not run.
        """
        self._image = 0.0 if cached_features else model.vision.flops
        parts = costs(model, bypass)
        passes = forward_passes(parts, learning)
        self._tower_passes = passes["vision"]
        self._costs = [(passes[cost.part], cost) for cost in parts]

    def count(self, batch: PackedBatch) -> float:
        """Floating-point operations of forward and backward passes of a micro-batch that still lies on the CPU.

        Of the share of a context-parallel rank, those of that rank.
        """
        squares = batch.cu_seqlens.diff().double().square().sum().item()
        ranks = 1 if batch.context is None else batch.context.rows.size  # which share the rows of the micro-batch
        flops = 0.0
        for passes, cost in self._costs:
            if cost.only_beside_images and not batch.visual_rows.numel():
                continue
            shared = (batch.num_rows * cost.row + squares * cost.pair) / ranks
            flops += passes * (shared + batch.label_rows.numel() * cost.label + batch.num_images * cost.image)
        if batch.image_features is None:  # (later pipeline stages have neither pixels nor features)
            flops += self._tower_passes * batch.num_images * self._image
        return flops
