"""ms-swift's command trains and asks an exported directory with the plugin file, on a LLaVA-format file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.foreign_files import copy_fixture

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "parrot_tiny"
pytest.importorskip("swift", reason="runs in an environment of its own: make test-integrations ARGS=ms_swift")
RECORDS = 4


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`swift ARGS...` with the plugin."""
    plugin = subprocess.check_output([sys.executable, "-m", "parrot_sys.integrations.ms_swift"], text=True).strip()
    command = [sys.executable, "-m", "swift.cli.main", *arguments, "--external_plugins", plugin]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=900, check=False)


def llava_file(folder: Path, records: int = RECORDS) -> Path:
    """Conversations with a picture each, as LLaVA's data are written."""
    held = json.loads((FIXTURE / "conversations.json").read_text(encoding="utf-8"))[:records]
    rows = [
        {
            "id": str(record["id"]),
            "image": str(FIXTURE / f"image_{record['image']}.png"),
            "conversations": record["conversations"],
        }
        for record in held
    ]
    (folder / "llava.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder / "llava.json"


def sft(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Two steps over all records, with everything but the tower."""
    options = {
        "model": str(copy_fixture(folder)),
        "dataset": str(llava_file(folder)),
        "tuner_type": "full",
        "freeze_aligner": "false",
        "torch_dtype": "float32",
        "max_steps": "2",
        "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "2",
        "gradient_checkpointing": "false",
        "learning_rate": "1e-3",
        "logging_steps": "1",
        "save_steps": "2",
        "output_dir": str(folder / "out"),
        "report_to": "none",
        "split_dataset_ratio": "0",
        "dataset_num_proc": "1",
        "dataloader_num_workers": "0",
        "use_hf": "true",
    }
    return run(folder, "sft", *(part for name, value in options.items() for part in (f"--{name}", value)), *more)


def own_loss(directory: Path, records: list[dict[str, Any]]) -> float:
    """Mean loss of all labels, by the model and the processor of parrot_sys."""
    import parrot_sys

    model, processor = parrot_sys.load_pretrained(directory, device="cpu")
    total = count = 0.0
    for record in records:
        encoded = processor.format_conversation(record["conversations"])
        labels = torch.tensor([encoded["labels"]])
        with torch.no_grad():
            output = model(
                torch.tensor([encoded["input_ids"]]), images=processor.images([record["image"]]), labels=labels
            )
        labelled = float((labels != -100).sum())
        total, count = total + float(output.loss) * labelled, count + labelled
    return total / count


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swift")
    result = sft(folder)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return folder


def checkpoint(trained: Path) -> Path:
    return next((trained / "out").rglob("checkpoint-2"))


def test_the_first_loss_is_ours_and_the_second_is_lower(trained: Path) -> None:
    lines = [json.loads(line) for line in (checkpoint(trained).parent / "logging.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    records = json.loads((trained / "llava.json").read_text(encoding="utf-8"))
    assert losses[0] == pytest.approx(own_loss(trained / "model", records), abs=1e-4)
    assert losses[1] < losses[0]


def test_the_checkpoint_is_an_exported_directory_with_what_was_trained(trained: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (trained / "model", checkpoint(trained)))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained_parts = ("moe_model.gate", "mm_projector.0", "layers.0.mlp.up_proj")
    assert {f"model.{part}.weight" for part in trained_parts} <= changed
    assert not any("vision_tower" in name for name in changed)
    records = json.loads((trained / "llava.json").read_text(encoding="utf-8"))
    assert own_loss(checkpoint(trained), records) < own_loss(trained / "model", records)


def test_what_our_models_do_not_do_is_refused_by_name(tmp_path: Path) -> None:
    result = sft(tmp_path, "--loss_scale", "all")
    assert result.returncode != 0
    assert "loss_scale=all" in result.stdout + result.stderr


def test_adapters_are_refused_by_name(tmp_path: Path) -> None:
    result = sft(tmp_path, "--tuner_type", "lora")
    assert result.returncode != 0
    assert "tuner_type=lora: models of parrot_sys have no adapters here" in result.stdout + result.stderr


def own_answers(directory: Path, records: list[dict[str, Any]], tokens: int) -> list[str]:
    """Most likely answers to the first questions, by the model and the processor of parrot_sys."""
    import parrot_sys

    model, processor = parrot_sys.load_pretrained(directory, device="cpu")
    answers = []
    for record in records:
        encoded = processor.format_conversation(record["conversations"][:1], add_generation_prompt=True)
        prompt = torch.tensor([encoded["input_ids"]])
        ids = model.generate(prompt, images=processor.images([record["image"]]), max_new_tokens=tokens)
        answer = ids[0, prompt.shape[1] :].tolist()
        ends = [place for place, token in enumerate(answer) if token in model.eos_token_ids]
        answers.append(processor.tokenizer.decode(answer[: ends[0]] if ends else answer))
    return answers


@pytest.mark.parametrize("options", [["--max_batch_size", "4"], ["--stream", "true"]], ids=["batch", "stream"])
def test_answers_of_swift_infer_are_ours(tmp_path: Path, options: list[str]) -> None:
    records = json.loads(llava_file(tmp_path).read_text(encoding="utf-8"))
    for record in records:
        record["conversations"] = record["conversations"][:2]  # (ms-swift asks for the last answer)
    (tmp_path / "llava.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    directory = copy_fixture(tmp_path)
    result = run(
        tmp_path,
        *("infer", "--model", str(directory), "--val_dataset", str(tmp_path / "llava.json")),
        *("--torch_dtype", "float32", "--max_new_tokens", "8", "--temperature", "0", "--use_hf", "true"),
        *("--result_path", str(tmp_path / "answers.jsonl"), *options),
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = own_answers(directory, records, 8)
    assert len(set(wanted)) > 1
    assert [json.loads(line)["response"] for line in lines] == wanted
