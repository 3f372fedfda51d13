"""Training from streams: a run that was killed goes on as if nothing had happened, on several ranks."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest

from parrot_sys.data.stream.config import StreamConfig
from parrot_sys.errors import ConfigError
from tests.training.tiny import losses, run, signal_before, tiny_config


def test_a_stopped_run_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=7, output="whole")
    records = json.loads((tmp_path / "records.json").read_text())
    (tmp_path / "shards").mkdir()
    for number in range(3):
        lines = "\n".join(json.dumps(record) for record in records[number::3])
        (tmp_path / f"shards/{number}.jsonl").write_text(lines, encoding="utf-8")
    stream = StreamConfig(enabled=True, buffer=5, open_shards=2)
    data = dataclasses.replace(config.data, paths=(str(tmp_path / "shards"),), stream=stream, prefetch_steps=3)
    whole, stopped = (dataclasses.replace(config, data=data, output=str(tmp_path / name)) for name in ("a", "b"))
    run(whole, 2)
    assert [summary["finished"] for summary in run(stopped, 2, signal_before(5, signal.SIGTERM))] == [False, False]
    run(stopped, 2)
    assert losses(stopped) == losses(whole)
    assert len(losses(whole)) == 7


def test_the_length_of_a_stream_must_be_said(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    data = dataclasses.replace(config.data, stream=StreamConfig(enabled=True))
    with pytest.raises(ConfigError, match="max_steps must say how long the run is"):
        dataclasses.replace(config, data=data)
    with pytest.raises(ConfigError, match="cache_image_features needs to know all pictures"):
        dataclasses.replace(config, data=data, max_steps=3, cache_image_features=True)
