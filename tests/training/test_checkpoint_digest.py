"""The digest of a checkpoint follows what decides its answers, and nothing else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from parrot_sys.evaluation.digest import checkpoint_digest
from parrot_sys.inference.convert import ConvertConfig, convert
from parrot_sys.megatron.checkpoint import reader as checkpoint_reader
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import CheckpointConfig, OptimizerConfig, TrainConfig
from tests.training.tiny import MODEL, run, tiny_config

STEPS = 2


def _config(folder: Path, output: str, *, zero1: bool = False, lr: float = 1e-3) -> TrainConfig:
    return replace(
        tiny_config(folder, output=output, copies=1, max_steps=STEPS),
        optimizer=OptimizerConfig(lr=lr, distributed=zero1),
        checkpoint=CheckpointConfig(interval=1, load_from=str(MODEL), export=False),
    )


def test_weights_count_and_neither_optimizer_nor_layout_does(tmp_path: Path) -> None:
    run(_config(tmp_path, "one"))
    run(_config(tmp_path, "other", lr=2e-3))
    steps = [tmp_path / "one" / "checkpoints" / f"step-{step:08d}" for step in (1, 2)]

    def as_ranks_wrote_it(rank: int, size: int) -> None:
        convert(ConvertConfig(checkpoint=steps[1], output=tmp_path / "bare", format="megatron"))

    run_distributed(as_ranks_wrote_it, 1)
    last = checkpoint_digest(tmp_path / "one")
    assert last == checkpoint_digest(steps[1]), "a run is its newest checkpoint"
    assert checkpoint_digest(tmp_path / "bare") == last, "it has no optimizer"
    assert len({last, checkpoint_digest(steps[0]), checkpoint_digest(tmp_path / "other")}) == 3
    for file in ("model_config.yaml", "processor/tokenizer.json"):
        changed = tmp_path / "changed"
        shutil.copytree(steps[1], changed)
        (changed / file).write_text((changed / file).read_text() + "\n")
        assert checkpoint_digest(changed) != last, file
        shutil.rmtree(changed)


def test_the_same_weights_of_one_and_two_ranks(tmp_path: Path) -> None:
    """The ranks of the second run only write the weights that it starts from."""
    run(_config(tmp_path, "one"))
    start = str(tmp_path / "one")
    frozen = OptimizerConfig(lr=1e-30, distributed=True)  # too small for any weight to change
    config = replace(_config(tmp_path, "two"), optimizer=frozen)
    run(replace(config, checkpoint=replace(config.checkpoint, load_from=start), max_steps=1), 2)
    assert len(list((tmp_path / "two" / "checkpoints" / "step-00000001").glob("*.distcp"))) == 2
    assert checkpoint_digest(tmp_path / "two") == checkpoint_digest(tmp_path / "one")


def test_little_is_read(tmp_path: Path) -> None:
    run(_config(tmp_path, "run"))
    folder, read = tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}", []
    taken = checkpoint_reader.DataReader.read_data

    def counted(self: checkpoint_reader.DataReader, plan: object, planner: object) -> object:
        read.extend(self.storage_data[item.storage_index].length for item in plan.items)
        return taken(self, plan, planner)

    def digest(rank: int, size: int) -> tuple[int, int]:
        checkpoint_reader.DataReader.read_data = counted
        checkpoint_digest(folder)
        return sum(read), sum(path.stat().st_size for path in folder.glob("*.distcp"))

    ((bytes_read, whole),) = run_distributed(digest, 1)
    assert 0 < bytes_read < 0.5 * whole, "weights, and neither main parameters nor averages"


def test_what_trainers_leave_beside_a_released_model_does_not_count(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    before = checkpoint_digest(tmp_path / "model")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "global_step7/shard.pt"):
        path = tmp_path / "model" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"state")
    assert checkpoint_digest(tmp_path / "model") == before
    (tmp_path / "model" / "config.json").write_text("{}")
    assert checkpoint_digest(tmp_path / "model") != before
