"""A checkpoint with something missing or changed is named, and never taken for a whole one or for none."""

from __future__ import annotations

import contextlib
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parrot_sys.errors import CheckpointError
from parrot_sys.evaluation.digest import checkpoint_digest
from parrot_sys.megatron.checkpoint.checksums import verify_checksums
from parrot_sys.megatron.checkpoint.reader import load_common
from parrot_sys.models.checkpoint_files import CHECKSUMS
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.checkpoint import CheckpointStore
from parrot_sys.training.config import CheckpointConfig, TrainConfig
from parrot_sys.training.trainer import Trainer
from tests.training.damage import damaged, files_of, sign
from tests.training.readers import READERS, STEP, Reader, name_of, refused, resume, run_of_one_step
from tests.training.tiny import MODEL, run, tiny_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run of one step."""
    return run_of_one_step(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run with checkpoints of two steps."""
    checkpoint = CheckpointConfig(interval=1, load_from=str(MODEL), export=False)
    config = tiny_config(tmp_path_factory.mktemp("two"), copies=1, max_steps=2, checkpoint=checkpoint)
    run(config)
    return config


@pytest.mark.parametrize("reader", READERS, ids=name_of)
def test_every_command_names_what_is_missing(reader: Reader, whole: Path, tmp_path: Path) -> None:
    for name in (".metadata", "metadata.json", "both", CHECKSUMS):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        checkpoint = folder / "run" / "checkpoints" / STEP
        for file in (".metadata", "metadata.json") if name == "both" else (name,):
            if file == CHECKSUMS:
                (checkpoint / file).write_text("{}")
            else:
                (checkpoint / file).unlink()
        said = refused(reader, folder, checkpoint)
        assert str(checkpoint) in said
        assert "is damaged" in said
        for file in (".metadata", "metadata.json") if name == "both" else (name,):
            assert file in said
        if reader is resume:
            assert "no checkpoint below" in said, "it does not begin anew"
            continue
        said = refused(reader, folder, folder / "run")
        assert str(checkpoint) in said, "also when the run is named"


def _latest(config: TrainConfig) -> str | None:
    """Name of the checkpoint that a start goes on from; None for an error. The folders keep their names."""
    store = CheckpointStore(config)
    store._set_aside = lambda folder: None  # type: ignore[method-assign]  # so that the next example finds it
    try:
        latest = store.latest()
    except CheckpointError:
        return None
    assert latest is not None, "begins anew"
    return latest.name


def test_the_newest_whole_one_is_taken_whatever_is_wrong_with_which_file(two: TrainConfig) -> None:
    folders = [Path(two.output) / "checkpoints" / f"step-{step:08d}" for step in (1, 2)]
    damages = st.tuples(
        st.sampled_from(files_of(folders[0])),
        st.sampled_from(["missing", "empty", "cut", "flipped"]),
        st.integers(0, 1 << 24),
    )

    def main(rank: int, size: int) -> None:
        @given(st.lists(st.none() | damages, min_size=2, max_size=2))
        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def check(what: list[tuple[str, str, int] | None]) -> None:
            good = [folder.name for folder, damage in zip(folders, what, strict=True) if damage is None]
            with contextlib.ExitStack() as stack:
                for folder, damage in zip(folders, what, strict=True):
                    if damage is not None:
                        stack.enter_context(damaged(folder / damage[0], *damage[1:]))
                assert _latest(two) == max(good, default=None), what

        check()

    run_distributed(main, 1)


def test_damaged_checkpoints_alone_are_no_new_run(two: TrainConfig, tmp_path: Path) -> None:
    config = replace(two, output=str(tmp_path / "run"))
    shutil.copytree(two.output, config.output)
    folder = Path(config.output) / "checkpoints"
    for step in (1, 2):
        (folder / f"step-{step:08d}").rename(folder / f"damaged-step-{step:08d}")

    def start(rank: int, size: int) -> str:
        with pytest.raises(CheckpointError) as error:
            Trainer(config)
        return str(error.value)

    (message,) = run_distributed(start, 1)
    assert "damaged-step-00000001, damaged-step-00000002" in message


def test_a_run_without_its_checkpoints_says_that_it_begins_anew(
    two: TrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = replace(two, output=str(tmp_path / "run"))
    shutil.copytree(two.output, config.output)
    shutil.rmtree(Path(config.output) / "checkpoints")
    assert run(config)[0]["steps"] == 2
    assert "training starts at step 0" in capfd.readouterr().err


def test_a_list_of_checksums_names_every_file_that_is_read_once(whole: Path, tmp_path: Path) -> None:
    def problems(rank: int, size: int) -> list[str]:
        found = []
        for before, after in (
            ("__0_0.distcp", "renamed"),
            ("processor/tokenizer.json", "renamed"),
            ("metadata.json", ".metadata"),
            ("model_config.yaml", "/dev/zero"),
            ("model_config.yaml", "../outside"),
        ):
            folder = tmp_path / f"{len(found)}"
            shutil.copytree(whole / "run" / "checkpoints" / STEP, folder)
            sign(folder)
            text = (folder / CHECKSUMS).read_text()
            (folder / CHECKSUMS).write_text(text.replace(f'"{before}"', f'"{after}"'))
            with pytest.raises(CheckpointError, match="is damaged") as error:
                verify_checksums(folder)
            found.append(str(error.value))
        return found

    (found,) = run_distributed(problems, 1)
    for before, message in zip(("__0_0.distcp", "processor/tokenizer.json", "metadata.json"), found, strict=False):
        assert before in message


def _problem(folder: Path) -> str | None:
    try:
        verify_checksums(folder)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_every_flipped_bit_and_every_cut_is_found_or_harmless(two: TrainConfig) -> None:
    """Random places of every file; what is not found has the same weights and the same progress."""
    folder = Path(two.output) / "checkpoints" / "step-00000002"
    draw = random.Random(20)

    def main(rank: int, size: int) -> tuple[int, int]:
        before = checkpoint_digest(folder), str(load_common(folder))
        found = harmless = 0
        for name in files_of(folder):
            bits = 8 * (folder / name).stat().st_size
            for how in ("flipped", "cut"):
                for place in [0, 8 * 4, bits - 1, *(draw.randrange(bits) for _ in range(60))]:
                    with damaged(folder / name, how, place if how == "flipped" else place // 8):
                        if said := _problem(folder):
                            assert str(folder) in said
                            found += 1
                        else:
                            assert (checkpoint_digest(folder), str(load_common(folder))) == before, (name, how, place)
                            harmless += 1
        return found, harmless

    ((found, harmless),) = run_distributed(main, 1, timeout=600)
    assert found > 1000
    assert harmless < 0.05 * found, "in white space of the list of checksums"
