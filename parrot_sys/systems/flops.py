"""Work of a model on a micro-batch, from the costs of its parts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from parrot_sys.data.batch import PackedBatch
from parrot_sys.models.lora_maps import llm_lora_maps
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.cost import Cost
from parrot_sys.systems.registry import system_of


def costs(model: ParrotConfig, bypass: Collection[str] = ()) -> list[Cost]:
    """Costs of all parts but the vision tower, in the order in which a gradient comes to them last."""
    llm, system = model.llm, system_of(model)
    attention = llm.num_layers * llm.hidden_size * (2 * llm.num_attention_heads + 2 * llm.num_query_groups)
    updates = sum(math.prod(shape) for entry in llm_lora_maps(llm, model.lora) for shape in entry.shapes)
    decoder = Cost(
        part="llm",
        row=2 * (attention * llm.kv_channels + llm.mlp_weights_per_row),
        pair=2 * llm.num_layers * llm.num_attention_heads * llm.kv_channels,  # causal: half, for scores and for values
        label=2 * llm.hidden_size * llm.vocab_size,
    )
    lora = [Cost(part="lora", row=2 * updates)] if updates else []  # begins in the first layer
    return [*system.image_costs(model, bypass), *lora, *system.layer_costs(model, bypass), decoder]


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
        gradient = learning["vision"]
        self._tower_passes = 3 if gradient else 1
        self._costs: list[tuple[int, Cost]] = []
        for cost in costs(model, bypass):
            self._costs.append((3 if learning[cost.part] else 2 if gradient else 1, cost))
            gradient = gradient or learning[cost.part]

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
