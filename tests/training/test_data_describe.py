"""`parrot data describe`: the numbers are those of the samples that the loader gives."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from parrot_sys.data.config import DataConfig
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.mix_config import MixStage
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import ConfigError
from parrot_sys.training.data_describe import main
from tests.data.comparing import PICTURES, record
from tests.data.picture_archives import write_files
from tests.training.tiny import MODEL

CURRICULUM = [{"from_step": 4, "weights": [0.0, 1.5], "caps": {"small": 7}}]


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    write_files(tmp_path, {"a.png": PICTURES[0], "b.png": PICTURES[3]})
    big = [{**record(i, ["a.png", "b.png"][: i % 3]), "lang": "en" if i % 4 else "zh"} for i in range(17)]
    small = [{**record(i, []), "lang": "en"} for i in range(6)]
    for name, records in (("big", big), ("small", small)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return [str(tmp_path / "big.json"), str(tmp_path / "small.json")]


def test_the_numbers_are_those_of_an_epoch(sets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix = {"weights": [1.0, 2.5], "language_alpha": 0.5, "caps": {"big": 15}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"data": mix | {"curriculum": CURRICULUM}}))
    arguments = ["--data.paths", *sets, "--config", str(tmp_path / "mix.yaml"), "--checkpoint.load-from", str(MODEL)]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    own = (MixStage(from_step=4, weights=(0.0, 1.5), caps={"small": 7}),)
    config = DataConfig(paths=tuple(sets), weights=(1.0, 2.5), language_alpha=0.5, caps={"big": 15}, curriculum=own)
    processor = ParrotProcessor.from_pretrained(MODEL)
    loader = ParrotDataLoader(config, processor, num_visual_rows=17, max_seq_len=2048, global_batch_size=128)
    samples, tokens, pictures = Counter[tuple[str, str]](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for batch in (batch for step in loader for batch in step):
        for i, name in enumerate(batch.record_ids):
            key = (name.split(":")[0], batch.languages[i])
            samples[key] += 1
            tokens[key] += int(batch.cu_seqlens[i + 1] - batch.cu_seqlens[i])
            pictures[key] += int((batch.image_sample == i).sum())
    first = [row for row in rows if row["from_step"] == 0]
    for name, counts in (("samples", samples), ("tokens", tokens), ("pictures", pictures)):
        assert {(row["data_set"], row["language"]): row[name] for row in first} == {
            key: counts[key] for key in (("big", "en"), ("big", "zh"), ("small", "en"))
        }
    later = {(row["data_set"], row["language"]): row["samples"] for row in rows if row["from_step"] == 4}
    assert later == {("big", "en"): 0, ("big", "zh"): 0, ("small", "en"): 7}
    assert main([*arguments, "--plot", str(tmp_path / "plots/mix.svg")]) == 0
    text = capsys.readouterr().out
    assert f"| big | zh | 5 | {samples['big', 'zh']} |" in text
    assert "From step 4 on:" in text
    assert "<svg" in (tmp_path / "plots/mix.svg").read_text(encoding="utf-8")


def test_what_is_missing_is_said(sets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="a tokenizer is needed"):
        main(sets)
    for arguments, message in (
        ([], "name at least one data set"),
        ([*sets, "--plot", str(tmp_path / "x.txt")], "plot must end in .svg, .png or .pdf"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
