"""Random schedules of requests, each answer held to a plain loop over `forward`; on any model.

    python -m tests.engine.schedules runs/demo/instruct/hf runs/demo-wings/instruct/hf --json FILE

runs 500 schedules on each checkpoint, of which half have hardly more blocks than one request, so that requests are
preempted. Then it takes parts of a picture's identity out of the hash of blocks, and asks how many schedules it takes
until an answer is wrong. All rows of the file are of one call.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import parrot_sys
from benchmarks.harness import machine
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.packing import Sample
from parrot_sys.engine.config import EngineConfig, SchedulerConfig
from parrot_sys.engine.core import Engine
from parrot_sys.engine.requests import EngineRequest, RequestImage, expand
from parrot_sys.inference.model import ParrotForConditionalGeneration

NEW_TOKENS = 12


class UnclearError(AssertionError):
    """Two tokens are as likely as each other but for rounding, so that no answer is the right one."""


@dataclass(frozen=True)
class Prompt:
    """Ids, -1 - i for picture i of three."""

    ids: tuple[int, ...]


# Words before and after a picture alike and not; the same picture, asked otherwise; two of the same; text alone.
OPENING = (5, 9, 14, 30, 31, 7, 8, 11)
PROMPTS = (
    Prompt((*OPENING, -1, 40, 41, 42)),
    Prompt((*OPENING, -1, 50, 51)),
    Prompt((*OPENING, -2, 40, 41, 42)),
    Prompt((*OPENING, -1, 40, 41, -2, 60)),
    Prompt((*OPENING, 40, 41, 42)),
    Prompt((-1, -1, 20)),
    Prompt((70,)),
    Prompt((*range(90, 121), -3)),
)


@dataclass
class Served:
    """A model, its pictures, and what a plain loop answers."""

    model: ParrotForConditionalGeneration
    pixels: Tensor
    prompts: tuple[Prompt, ...] = PROMPTS
    known: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)
    preempted_with_pictures: int = 0
    """Requests with pictures that schedules have preempted and computed again."""

    def sample(self, number: int) -> Sample:
        ids = self.prompts[number].ids
        pictures = [self.pixels[-1 - own] for own in ids if own < 0]
        return Sample(
            input_ids=[IMAGE_TOKEN_ID if own < 0 else own for own in ids],
            pixel_values=torch.stack(pictures) if pictures else None,
        )

    def rows(self, number: int) -> int:
        """Rows of a prompt, with its pictures."""
        sample, model = self.sample(number), self.model.lockstep
        request = EngineRequest(sample=sample, max_new_tokens=1)
        return len(expand(request, model.rows_per_image, model.guidance, model.readers, guided=model.guided).ids)

    @torch.no_grad()
    def answer(self, number: int) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities, by running everything again for each token."""
        if number not in self.known:
            sample, tokens, values = self.sample(number), [], []
            for _ in range(NEW_TOKENS):
                # (What has a label guides no route.)
                ids = torch.tensor([[*sample.input_ids, *tokens]])
                labels = torch.tensor([[IGNORE_ID] * len(sample.input_ids) + tokens])
                mask = torch.ones_like(ids)  # an answer may hold the id of the padding
                logits = self.model(ids, mask, sample.pixel_values, labels).logits[0, -1]
                best = logits.log_softmax(-1).topk(2)
                if best.values[0] - best.values[1] <= 1e-4:
                    raise UnclearError(f"prompt {number} has no clear answer: take other ids")
                if best.indices[0] == self.model.config.image_token_id:
                    # (For `forward` it stands for a picture, which is not there.)
                    raise UnclearError(f"prompt {number} is answered with a picture's marker: take other ids")
                tokens.append(int(best.indices[0]))
                values.append(float(best.values[0]))
            self.known[number] = tokens, values
        return self.known[number]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How requests come and go, and how much room there is."""

    requests: list[tuple[int, int, int, int | None]]
    """Prompt, tokens, step of its arrival, and after how many steps it is cancelled."""
    block_size: int
    spare_blocks: int
    rows: int
    running: int
    feature_bytes: int = 2**20
    rests: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Step -> the request, by the order of arrival, that rests from then on, and for how many steps."""

    def run(self, served: Served, **options: Any) -> Engine:
        """Runs it and compares each answer."""
        model = served.model.lockstep
        most = max((served.rows(prompt) + count for prompt, count, *_ in self.requests), default=1)
        per_step = max(self.rows, self.running)
        sizes = SchedulerConfig(max_rows_per_step=per_step, max_logits_per_step=per_step, max_running=self.running)
        config = EngineConfig(
            num_blocks=-(-most // self.block_size) + self.spare_blocks,
            block_size=self.block_size,
            feature_bytes=self.feature_bytes,
            routed_bytes=self.feature_bytes,
            scheduler=sizes,
        )
        engine = Engine(model, config, **options)
        waiting = sorted(enumerate(self.requests), key=lambda each: each[1][2])
        numbers: dict[int, tuple[int, int]] = {}
        tokens: dict[int, list[int]] = {}
        reasons: dict[int, str] = {}
        cancels: dict[int, int] = {}
        preempted: set[int] = set()
        resting: dict[int, int] = {}
        step = 0
        while waiting or resting or engine.has_requests:
            while waiting and waiting[0][1][2] <= step:
                _, (prompt, count, _, patience) = waiting.pop(0)
                request = EngineRequest(sample=served.sample(prompt), max_new_tokens=count, logprobs=0)
                number = engine.submit(request)
                numbers[number], tokens[number] = (prompt, count), []
                if patience is not None:
                    cancels[number] = step + patience
            for number in [number for number, when in cancels.items() if when <= step]:
                engine.cancel(number)
                del cancels[number]
            if step in self.rests:
                number, length = self.rests[step]
                engine.pause(number)
                resting[number] = step + length
            for number in [number for number, until in resting.items() if until <= step]:
                engine.resume(number)
                del resting[number]
            for delta in engine.step():
                self._compare(served, numbers[delta.number][0], tokens[delta.number], delta)
                if delta.finish_reason is not None:
                    reasons[delta.number] = delta.finish_reason
            preempted |= {own.number for own in engine.scheduler.waiting if own.preemptions and own.pictures}
            step += 1
        served.preempted_with_pictures += len(preempted)
        assert engine.pool.num_free == config.num_blocks
        for number, (_, count) in numbers.items():
            if reasons[number] != "cancelled":
                assert (reasons[number], len(tokens[number])) == ("length", count)
        return engine

    def _compare(self, served: Served, prompt: int, tokens: list[int], delta: Any) -> None:
        wanted, values = served.answer(prompt)
        for token, found in zip(delta.tokens, delta.logprobs, strict=True):
            assert abs(found.logprob - values[len(tokens)]) <= 1e-4, f"prompt {prompt}"
            assert token == wanted[len(tokens)], f"prompt {prompt}"
            tokens.append(token)


RESTS = st.dictionaries(st.integers(0, 30), st.tuples(st.integers(0, 7), st.integers(0, 4)), max_size=4)
LOOSE = st.builds(
    Schedule,
    requests=st.lists(
        st.tuples(
            st.integers(0, len(PROMPTS) - 1),
            st.integers(1, NEW_TOKENS),
            st.integers(0, 8),
            st.none() | st.none() | st.integers(0, 6),
        ),
        min_size=1,
        max_size=8,
    ),
    block_size=st.integers(1, 20),
    spare_blocks=st.integers(0, 12),
    rows=st.sampled_from([1, 3, 7, 20, 64, 1000]),
    running=st.integers(1, 6),
    feature_bytes=st.sampled_from([0, 2**14, 2**20]),
    rests=RESTS,
)
# Long answers at the same time, and hardly more blocks than the largest of them takes alone.
TIGHT = st.builds(
    Schedule,
    requests=st.lists(
        st.tuples(
            st.integers(0, len(PROMPTS) - 1),
            st.integers(NEW_TOKENS - 4, NEW_TOKENS),
            st.integers(0, 3),
            st.none() | st.none() | st.none() | st.integers(0, 2 * NEW_TOKENS),
        ),
        min_size=4,
        max_size=8,
    ),
    block_size=st.integers(1, 4),
    spare_blocks=st.integers(0, 2),
    rows=st.sampled_from([7, 20, 64, 1000]),
    running=st.integers(4, 6),
    feature_bytes=st.sampled_from([0, 2**14, 2**20]),
    rests=RESTS,
)
SCHEDULES = LOOSE | TIGHT


def served_checkpoint(folder: Path) -> Served:
    """A checkpoint with pictures of noise, and the first prompts of its vocabulary that have a clear answer."""
    model, _ = parrot_sys.load_pretrained(folder)
    side = model.config.vision.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    for shift in range(0, model.config.llm.vocab_size // 2, 100):
        prompts = tuple(Prompt(tuple(own + shift if own >= 0 else own for own in prompt.ids)) for prompt in PROMPTS)
        served = Served(model, pixels, prompts)
        try:
            for number in range(len(prompts)):
                served.answer(number)
        except UnclearError:
            continue
        return served
    raise UnclearError(f"{folder}: no prompts with clear answers")


@contextmanager
def forgetting(part: str) -> Iterator[None]:
    """Leaves `guidance` or `image` out of the hash of blocks, which is a fault."""
    known = RequestImage.span
    with mock.patch.object(RequestImage, "span", lambda image: replace(known(image), **{part: b""})):
        yield


def walk(served: Served, examples: int, counts: Counter[str]) -> None:
    """Runs random schedules, and counts what happens in them.

    Raises:
        AssertionError: an answer is another one than that of the plain loop.
    """

    @seed(0)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(schedule=SCHEDULES)
    def run(schedule: Schedule) -> None:
        counts["schedules"] += 1
        engine = schedule.run(served)
        counts["requests"] += len(schedule.requests)
        counts["cancellations"] += sum(patience is not None for *_, patience in schedule.requests)
        counts["rests"] += len(schedule.rests)
        counts["steps"] += engine.steps
        counts["preemptions"] += engine.scheduler.num_preemptions
        counts["schedules_with_preemptions"] += engine.scheduler.num_preemptions > 0
        counts["blocks_found"] += engine.pool.hits

    run()


def schedules_until_found(served: Served, part: str, examples: int) -> int | None:
    """Schedules until the first wrong answer when `part` is left out of the hash of blocks; None: there was none."""
    counts: Counter[str] = Counter()
    try:
        with forgetting(part):
            walk(served, examples, counts)
    except AssertionError:
        return counts["schedules"]
    return None


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders in the released layout")
    parser.add_argument("--examples", type=int, default=500, help="schedules for each checkpoint (default 500)")
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for folder in arguments.checkpoints:
        served, start = served_checkpoint(folder), time.process_time()
        counts: Counter[str] = Counter()
        walk(served, arguments.examples, counts)
        counts["preempted_requests_with_pictures"] = served.preempted_with_pictures
        seconds = round(time.process_time() - start, 1)
        parts = ("guidance", "image") if served.model.lockstep.guided else ("image",)
        found = {part: schedules_until_found(served, part, arguments.examples) for part in parts}
        rows[str(folder)] = {**counts, "schedules_until_found_without": found, "cpu_seconds": seconds}
        print(f"{folder}: every answer is that of a single request: {rows[str(folder)]}", flush=True)
    if arguments.json is not None:
        result = {"benchmark": "engine_schedules", "machine": machine(), "checkpoints": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
