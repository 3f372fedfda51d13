"""Weights & Biases and MLflow, the real packages without a server: numbers, pictures, settings, and runs that go on."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from parrot_sys.training.config import LoggingConfig, TrainConfig, ValidationConfig
from tests.training.tiny import FIXTURE, run, tiny_config

mlflow = pytest.importorskip("mlflow", reason="make test-integrations ARGS=trackers")
pytest.importorskip("wandb", reason="make test-integrations ARGS=trackers")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of four steps that was interrupted after the third."""
    folder = tmp_path_factory.mktemp("tracked")
    logging = LoggingConfig(
        interval=1,
        trackers=("tensorboard", "wandb", "mlflow"),
        project="parrots",
        name="first",
        samples=2,
        sample_tokens=6,
        progress=False,
    )
    plain = tiny_config(folder, max_steps=3)
    validation = ValidationConfig(paths=plain.data.paths, image_roots=(str(FIXTURE),), interval=2, batches=1)
    config = dataclasses.replace(plain, validation=validation, logging=logging)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run(config)
        config = dataclasses.replace(config, max_steps=4)
        run(config)
    return config


def wandb_records(file: Path) -> list[Any]:
    """Records of an offline run. The file is a log of LevelDB's format: a header, then pieces in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole, records = file.read_bytes(), 7, b"", []
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(Record.FromString(whole))
            whole = b""
    return records


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    """What was logged, one mapping a call."""
    rows = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_wandb_offline(tracked: TrainConfig) -> None:
    folders = sorted(Path(tracked.output, "wandb").glob("offline-run-*"))
    assert len(folders) == 2  # two starts ...
    assert len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1  # ... of one run
    every = [wandb_records(next(folder.glob("*.wandb"))) for folder in folders]
    first, second = map(history_of, every)
    assert [row["step"] for row in first if "train/loss" in row] == [1, 2, 3]
    assert [row["step"] for row in second if "train/loss" in row] == [4]
    (start,) = [record.run for record in every[1] if record.HasField("run")][:1]
    assert (start.project, start.display_name) == ("parrots", "first")
    settings = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert settings["global_batch_size"] == 8
    assert settings["environment"]["processes"] == 1
    (answers,) = [row for row in first if row["step"] == 2 and "validation/answers/filenames" in row]
    files, captions = answers["validation/answers/filenames"], answers["validation/answers/captions"]
    assert len(files) == len(captions) == 2
    assert all("wanted: " in caption for caption in captions)
    assert len({Image.open(folders[0] / "files" / name).size for name in files}) == 1  # as it wants them
    (routing,) = [row["validation/routing/filenames"] for row in second if "validation/routing/filenames" in row]
    for folder, name in [*((folders[0], name) for name in files), (folders[1], routing[0])]:
        assert Image.open(folder / "files" / name).width > 100


def test_mlflow_without_a_server(tracked: TrainConfig) -> None:
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{Path(tracked.output, 'mlflow.db')}")
    (found,) = client.search_runs([client.get_experiment_by_name("parrots").experiment_id])
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.params["model.moe.num_experts"] == str(tracked.model.moe.num_experts)
    assert found.data.params["max_steps"] == "3"  # of the first start: MLflow keeps it
    assert [each.step for each in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 2, 3, 4]
    files = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "environment.json", "images"} <= files
    text = Path(client.download_artifacts(found.info.run_id, "config.yaml")).read_text()
    assert "max_steps: 4" in text  # of the last one
    images = [file.path for file in client.list_artifacts(found.info.run_id, "images")]
    for name in ("train~routing", "validation~routing", "validation~answers~0", "validation~answers~1"):
        assert any(name in path and path.endswith(".png") for path in images), images
    captions = client.download_artifacts(found.info.run_id, "validation/answers/step-00000002.txt")
    assert Path(captions).read_text().count("wanted: ") == 2


def test_a_run_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parrot_sys.training.trackers.base import RunFacts
    from parrot_sys.training.trackers.mlflow import MlflowTracker

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    facts = RunFacts(output=tmp_path, project="p", name="n", config={}, environment={}, start_step=0)
    tracker = MlflowTracker(facts)
    tracker.close(failed=True)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert found.info.status == "FAILED"
