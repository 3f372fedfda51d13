"""Inputs of steps: those that take over from the step before are those that are built anew."""

from __future__ import annotations

import itertools

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_sys.engine.blocks import BlockPool, root_hash
from parrot_sys.engine.config import SchedulerConfig
from parrot_sys.engine.inputs import StepBuilder, StepInputs, build_step
from parrot_sys.engine.requests import RequestImage
from parrot_sys.engine.scheduler import ScheduledRequest, Scheduler


def image(first: int, rows: int, *, reads_on: bool) -> RequestImage:
    return RequestImage(
        place=range(first, first + rows),
        readers=range(first, 2**40 if reads_on else first + rows),
        source=torch.arange(rows),
        num_images=1,
        pixels=None,
        features=None,
        image=b"1",
        guidance=b"",
        rows=torch.randn(rows, 4),
    )


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(1, 12), st.sampled_from(["none", "held", "read"])),
        min_size=1,
        max_size=6,
    ),
    block_size=st.integers(1, 5),
    blocks=st.integers(0, 12),
    rows=st.integers(3, 30),
    rests=st.dictionaries(st.integers(0, 40), st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=8),
)
@example([(0, 2, 9, "none"), (9, 2, 9, "none")], 2, 0, 9, {12: (1, 0)})
def test_a_step_that_goes_on_is_that_built_anew(
    arrivals: list[tuple[int, int, int, str]],
    block_size: int,
    blocks: int,
    rows: int,
    rests: dict[int, tuple[int, int]],
) -> None:
    """Under arrivals, ends, preemption, rests, shared prefixes, answers given again and growing tables, with and
    without pictures."""
    scheduler = Scheduler(SchedulerConfig(max_rows_per_step=rows, max_running=3), BlockPool(21 + blocks, block_size))
    builder, images, waiting = StepBuilder(block_size), {}, sorted(arrivals, key=lambda own: own[0])
    requests: list[ScheduledRequest] = []
    resting: list[tuple[int, ScheduledRequest]] = []
    for step in itertools.count():
        while waiting and waiting[0][0] <= step:
            _, length, new, kind = waiting.pop(0)
            request = ScheduledRequest(
                number=len(images),
                ids=list(range(length)),  # so that beginnings are shared
                max_new_tokens=new,
                root=root_hash(kind.encode()),
                logits_from=length - 1,
            )
            shown = [] if kind == "none" else [image(length // 3, length - length // 3, reads_on=kind == "read")]
            images[request.number] = shown
            scheduler.submit(request)
            requests.append(request)
        for until, request in [own for own in resting if own[0] <= step]:
            scheduler.resume(request)
            resting.remove((until, request))
        if step in rests and rests[step][0] < len(requests):
            number, length = rests[step]
            scheduler.pause(requests[number])
            resting.append((step + length, requests[number]))
            if not length:
                scheduler.resume(requests[number])
        if not (waiting or resting or scheduler.has_requests):
            break
        chunks = scheduler.schedule().chunks
        if not chunks:
            continue
        shown_of = [images[chunk.request.number] for chunk in chunks]
        found, wanted = builder.build(chunks, shown_of), build_step(chunks, shown_of, block_size)
        for name in (*StepInputs.integer_fields(), "image_rows"):
            ours, theirs = getattr(found, name), getattr(wanted, name)
            same = torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours is theirs
            assert same, f"step {step}: {name}"
        for chunk in chunks:
            scheduler.complete(chunk)
            if chunk.stop == len(chunk.request.ids):
                if chunk.request.max_new_tokens:
                    scheduler.append(chunk.request, chunk.stop * 7 % 50)
                else:
                    scheduler.finish(chunk.request)


def test_steps_of_the_same_answers_share_what_stays() -> None:
    """Whoever runs steps tells by that what it need not make again."""
    scheduler, builder, bounds = Scheduler(SchedulerConfig(), BlockPool(9, 2)), StepBuilder(2), []
    for number in range(2):
        request = ScheduledRequest(
            number=number, ids=[1, 2], max_new_tokens=5, root=root_hash(b"%d" % number), logits_from=1
        )
        scheduler.submit(request)
    for _ in range(4):
        chunks = scheduler.schedule().chunks
        bounds.append(builder.build(chunks, [[], []]).bounds)
        for chunk in chunks:
            scheduler.complete(chunk)
            scheduler.append(chunk.request, 3)
    assert bounds[0] is not bounds[1]
    assert bounds[1] is bounds[2] is bounds[3]
