"""Optimizer state of a checkpoint in the shape that this process's optimizer has.

Megatron keeps an optimizer for dense and one for expert parameters, but only on ranks whose experts are split (EP > 1).
A checkpoint's tensors do not depend on that, but its parameter groups do, and in other people's checkpoints prefixes of
its keys. Rank 0 alone writes the groups, which need not be those of another pipeline stage either. All that is taken
from them is how many steps were done: a setting that was changed holds from the resumed step on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from parrot_sys.errors import CheckpointError

Group = dict[str, Any]

_PREFIX = re.compile(r"chained_\d+\.")
_MAIN, _MAIN_BF16 = "optimizer.state.param.", "optimizer.state.fp32_param."


def use_saved_keys(state: Any, saved: Collection[str]) -> None:
    """Renames the sharded tensors of `state` that the checkpoint has under another key.

    That is with or without a `chained_N.` in front, and main parameters beside bf16 weights: the distributed optimizer
    calls them `param`, the other one `fp32_param`.

    Args:
        state: sharded state dict of an optimizer; changed in place.
        saved: keys of the checkpoint.
    """
    plain = {_PREFIX.sub("", key, count=1): key for key in saved}
    for part in _sharded(state):
        if part.key not in saved:
            key = _PREFIX.sub("", part.key, count=1)
            part.key = plain.get(key, plain.get(_other_name(key), part.key))


def _other_name(key: str) -> str:
    """Key under which the other optimizer saves the same main parameter."""
    for own, other in ((_MAIN, _MAIN_BF16), (_MAIN_BF16, _MAIN)):
        if key.startswith(own):
            return other + key.removeprefix(own)
    return key


def groups_of(state: Any) -> list[Group]:
    """All parameter groups in a state dict, however many optimizers they are spread over; copies."""
    if isinstance(state, dict):
        own = [dict(group) for group in state.get("param_groups", ())]
        return own + [group for name, value in state.items() if name != "param_groups" for group in groups_of(value)]
    if isinstance(state, list | tuple):
        return [group for value in state for group in groups_of(value)]
    return []


def with_saved_step(template: Any, loaded: Any, saved: list[Group]) -> Any:
    """State for `optimizer.load_state_dict`: structure and settings of `template`, tensors of `loaded`.

    Settings (learning rates, weight decay, betas, eps) are those that the optimizer was built with: of a saved group
    only the number of its steps is state.

    Args:
        template: the optimizer's own sharded state dict.
        loaded: what `dist_checkpointing.load` made of it.
        saved: from `groups_of` of the checkpoint.

    Raises:
        CheckpointError: the checkpoint has no parameter groups, or they are at different steps.
    """
    steps = {group["step"] for group in saved if "step" in group}
    if not saved or len(steps) > 1:
        raise CheckpointError(
            f"the optimizer of the checkpoint must have parameter groups at one step, it has {len(saved)} at steps "
            f"{sorted(steps)}"
        )
    return _fill(template, loaded, {"step": steps.pop()} if steps else {})


def _fill(template: Any, loaded: Any, step: Group) -> Any:
    if not isinstance(template, dict):
        return template if loaded is None else loaded
    loaded = loaded if isinstance(loaded, dict) else {}
    result = dict(loaded)
    for name, value in template.items():
        if name == "param_groups":
            own = loaded.get(name) or [{}] * len(value)  # what Megatron keeps out of the files: numbers of parameters
            result[name] = [group | step | numbers for group, numbers in zip(value, own, strict=True)]
        else:
            result[name] = _fill(value, loaded.get(name), step)
    return result


def _sharded(state: Any) -> Iterator[ShardedTensor | ShardedObject | ShardedTensorFactory]:
    if isinstance(state, ShardedTensor | ShardedObject | ShardedTensorFactory):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _sharded(value)
