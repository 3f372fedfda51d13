"""Chat and evaluation on several processes give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import parrot_sys
from parrot_sys.engine.lockstep import check_processes, inference_layout
from parrot_sys.errors import ConfigError
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.testing.distributed import run_distributed

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parrot_tiny"
IMAGE = FIXTURE / "image_0.png"
PROMPTS = ("What is this?", "<image>\nDescribe the picture.", "<image>\nAnd this one, in one word?")
LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2-ep2": (
        2,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "pp2-ep2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
}


def _answers(parallel: ParallelConfig | None, *, leads: bool) -> list[torch.Tensor]:
    """Greedy tokens of a batch, log-probabilities of continuations, and the routes."""
    model, processor = parrot_sys.load_pretrained(FIXTURE / "model", parallel=parallel)
    results: list[torch.Tensor] = []

    def program() -> int:
        turns = [[{"from": "human", "value": prompt}] for prompt in PROMPTS]
        encoded = [processor.format_conversation(turn, add_generation_prompt=True)["input_ids"] for turn in turns]
        longest = max(map(len, encoded))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in encoded])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded])
        pixels = processor.images([IMAGE, IMAGE])
        # Ends at different lengths, so that requests leave the cache one by one.
        tokens, routing = model.generate(
            ids, mask, pixels, max_new_tokens=8, eos_token_id=list(range(0, 400, 7)), return_routing=True
        )
        scores = model.score(ids, [[[5, 6], [7]], [[8]], [[9, 3, 4], [2, 2]]], mask, pixels)
        assert routing is not None, "there are images"
        results.extend([tokens, routing.probs.detach(), *scores])
        return 0

    with torch.no_grad():
        if leads:
            model.lockstep.run(program)
        else:
            program()
    return results


@pytest.mark.parametrize(("name", "leads"), [*((name, True) for name in LAYOUTS), ("pp2", False)])
def test_greedy_tokens_are_those_of_one_process(name: str, leads: bool) -> None:
    ranks, sizes = LAYOUTS[name]
    parallel = ParallelConfig(**sizes)
    (wanted,) = run_distributed(lambda rank, size: _answers(None, leads=False), 1)
    results = run_distributed(lambda rank, size: _answers(parallel, leads=leads), ranks, timeout=120)
    for rank, got in enumerate(results):
        if leads and rank:
            assert got == []
            continue
        assert torch.equal(got[0], wanted[0])
        for ours, theirs in zip(got[1:], wanted[1:], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_steps_of_answers_are_sent_without_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long an answer is, as many messages of Python objects: those of the prompt."""

    def on_rank(rank: int, size: int) -> list[int]:
        parallel = ParallelConfig(tensor_model_parallel_size=size)
        model, _ = parrot_sys.load_pretrained(FIXTURE / "model", parallel=parallel)
        sent, counts = [], []
        send = dist.broadcast_object_list
        monkeypatch.setattr(dist, "broadcast_object_list", lambda box, **where: (sent.append(box), send(box, **where)))

        def program() -> int:
            for length in (1, 9):
                before = len(sent)
                model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=length, eos_token_id=[])
                counts.append(len(sent) - before)
            return 0

        with torch.no_grad():
            model.lockstep.run(program)
        return counts

    counts, followers = run_distributed(on_rank, 2)
    assert counts[0] == counts[1] > 0
    assert followers == []


@pytest.mark.slow
def test_chat_under_torchrun() -> None:
    command = ["-m", "parrot_sys", "chat", "--checkpoint", str(FIXTURE / "model"), "--image", str(IMAGE)]
    command += ["--message", "What is this?", "--max-new-tokens", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, env=environment)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    layout = ["--parallel.pipeline-model-parallel-size", "2"]
    together = subprocess.run(
        [*launcher, *command, *layout], capture_output=True, text=True, check=True, env=environment
    )
    assert together.stdout == alone.stdout


def test_layouts_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="context_parallel_size is for training only, got 2"):
        inference_layout(ParallelConfig(context_parallel_size=2))
    with pytest.raises(ConfigError, match="with 1 processes, got 2"):
        check_processes(ParallelConfig(), 2)
    check_processes(ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2), 4)
    check_processes(
        ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
        2,
    )
