"""Messages from the leading rank to the ranks that follow it: a header of integers tells what comes next."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parrot_sys.engine.inputs import StepInputs

_END, _OBJECT, _STEP = range(3)
_FIELDS = StepInputs.integer_fields()
_HEADER = 1 + len(_FIELDS) + 3  # kind, lengths of the fields, shape and dtype of the image rows
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def send_end(device: torch.device) -> None:
    """Tells the followers that nothing else comes."""
    _send_header(device, _END)


def send_object(message: Any, device: torch.device) -> None:
    """Sends anything that can be pickled."""
    _send_header(device, _OBJECT)
    dist.broadcast_object_list([message], src=0)


def send_step(inputs: StepInputs, device: torch.device) -> None:
    """Sends a step: its header, its integers and, where there are any, its image rows."""
    integers = [getattr(inputs, name) for name in _FIELDS]
    rows = inputs.image_rows
    shape = (0, 0, 0) if rows is None else (*rows.flatten(0, -2).shape, _DTYPES.index(rows.dtype))
    _send_header(device, _STEP, *(len(part) for part in integers), *shape)
    dist.broadcast(torch.cat(integers).to(device), src=0)
    if rows is not None:
        dist.broadcast(rows.flatten(0, -2).contiguous().to(device), src=0)


def receive(device: torch.device) -> StepInputs | tuple[str, dict[str, Any]] | None:
    """The next message: a step, the name and arguments of a call, or None at the end."""
    header = torch.empty(_HEADER, dtype=torch.int64, device=device)
    dist.broadcast(header, src=0)
    kind, *sizes = header.tolist()
    if kind == _END:
        return None
    if kind == _OBJECT:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0)
        call: tuple[str, dict[str, Any]] = box[0]
        return call
    lengths, (count, width, dtype) = sizes[: len(_FIELDS)], sizes[len(_FIELDS) :]
    integers = torch.empty(sum(lengths), dtype=torch.int64, device=device)
    dist.broadcast(integers, src=0)
    values: dict[str, Tensor] = dict(zip(_FIELDS, integers.cpu().split(lengths), strict=True))
    if not width:
        return StepInputs(**values)
    rows = torch.empty(count, width, dtype=_DTYPES[dtype], device=device)
    dist.broadcast(rows, src=0)
    return StepInputs(**values, image_rows=rows)


def _send_header(device: torch.device, kind: int, *sizes: int) -> None:
    header = torch.tensor([kind, *sizes, *[0] * (_HEADER - 1 - len(sizes))], device=device)
    dist.broadcast(header, src=0)
