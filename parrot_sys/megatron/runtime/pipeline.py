"""Logits of a model that is cut into pipeline stages, on every stage."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.errors import ConfigError
from parrot_sys.megatron.attention.paged import PagedRows
from parrot_sys.megatron.model import MultimodalModel, ParrotOutput
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride


def forward_logits(
    model: MultimodalModel,
    batch: PackedBatch,
    *,
    logits_rows: Tensor | None = None,
    routing_override: RoutingOverride | None = None,
    paged: PagedRows | None = None,
    output_router_weights: bool = False,
) -> ParrotOutput:
    """`model(batch, mode="logits", ...)` for one micro-batch; all ranks of one copy of the model call it alike.

    Hidden states go from stage to stage; logits and routes come back to all of them.

    Args:
        model: the part of this rank.
        batch: the same on every rank, on the device of the model.
        logits_rows, routing_override, paged, output_router_weights: see `MultimodalModel.forward`;
            each stage has the router weights of its own layers.

    Raises:
        ConfigError: gradients are wanted of a model in stages.
    """
    stages = model.pg_collection.pp
    inputs = {
        "logits_rows": logits_rows,
        "routing_override": routing_override,
        "paged": paged,
        "output_router_weights": output_router_weights,
    }
    if stages.size() == 1:
        output: ParrotOutput = model(batch, mode="logits", **inputs)
        return output
    if torch.is_grad_enabled():
        raise ConfigError(
            "a model cut into pipeline stages gives logits without gradients only: call it under torch.no_grad() or "
            "load it with parallel.pipeline_model_parallel_size=1"
        )
    device, dtype = batch.input_ids.device, model.config.params_dtype
    if not model.pre_process:
        plan = model.bridge.plan(batch, paged)
        hidden = torch.empty(model.decoder.hidden_shape(batch.num_rows, plan), dtype=dtype, device=device)
        dist.recv(hidden, group=stages, group_src=stages.rank() - 1)
        model.set_input_tensor(hidden)
    output = model(batch, mode="logits", **inputs)
    if output.hidden is not None:
        dist.send(output.hidden.contiguous(), group=stages, group_dst=stages.rank() + 1)
    logits = output.logits
    if logits is None:
        num_rows = batch.num_rows if logits_rows is None else logits_rows.numel()
        logits = torch.empty(num_rows, model.bridge.llm.vocab_size, dtype=dtype, device=device)
    logits = logits.contiguous()
    dist.broadcast(logits, group=stages, group_src=stages.size() - 1)
    # (Images of a paged step were routed before it.)
    routing = share_routes(output.routing, model) if batch.num_images and paged is None else output.routing
    return dataclasses.replace(output, logits=logits, hidden=None, routing=routing)


def share_routes(routing: RoutingOutput | None, model: MultimodalModel) -> RoutingOutput | None:
    """Routes of the first pipeline stage on all stages, on this rank's device; every stage calls it."""
    stages = model.pg_collection.pp
    if stages.size() == 1:
        return routing
    routes = [None if routing is None else _moved(routing, torch.device("cpu"))]
    dist.broadcast_object_list(routes, group=stages, group_src=0)
    return None if routes[0] is None else _moved(routes[0], next(model.parameters()).device)


def _moved(routing: RoutingOutput, device: torch.device) -> RoutingOutput:
    tensors = {field.name: getattr(routing, field.name) for field in dataclasses.fields(routing)}
    moved: dict[str, Any] = {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
    return dataclasses.replace(routing, **moved)
