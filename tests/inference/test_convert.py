"""`parrot convert`, and import and export of every form a released checkpoint comes in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import parrot_sys
from parrot_sys.config_values import config_to_dict, load_config
from parrot_sys.errors import CheckpointError
from parrot_sys.inference.convert import main
from parrot_sys.inference.pretrained import save_pretrained
from parrot_sys.megatron.runtime.initialize import shutdown
from parrot_sys.models.tensor_files import TensorFiles
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.systems.config import ParrotConfig
from tests.inference.released_reference import FIXTURE, ReleasedParrot, Shape, write_checkpoint


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


def _tensors(directory: Path) -> dict[str, Tensor]:
    with TensorFiles(directory) as files:
        return {key: files.tensor(key).clone() for key in files.names()}


def _assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The fixture with its tower beside it, free to be changed."""
    shutil.copytree(FIXTURE / "clip-vit-tiny", tmp_path / "clip-vit-tiny")
    shutil.copytree(FIXTURE / "model", tmp_path / "model")
    return tmp_path / "model"


def _rewrite(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_released_to_released(tmp_path: Path) -> None:
    assert main(["--checkpoint", str(FIXTURE / "model"), "--output", str(tmp_path / "out")]) == 0
    _assert_equal(_tensors(tmp_path / "out"), _tensors(FIXTURE / "model"))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((FIXTURE / "model" / name).read_text())
    for name in ("tokenizer.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (FIXTURE / "model" / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing temporary is left
    model, processor = parrot_sys.load_pretrained(tmp_path / "out")  # needs nothing beside it
    assert processor.image_processor.height == 56
    assert processor.image_processor.pad_to_square
    assert model.config.vision.num_layers == 3


@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_merging_lora(copy: Path, tmp_path: Path, form: str) -> None:
    base, layer = _tensors(copy), "model.layers.1.self_attn.k_proj"
    lora = LoRAConfig(rank=2, alpha=3.0, targets=("k_proj",))
    rows, columns = base[f"{layer}.weight"].shape
    updates = {}
    for index in range(2):
        name = f"model.layers.{index}.self_attn.k_proj"
        updates |= {f"{name}.lora_A.weight": torch.randn(2, columns), f"{name}.lora_B.weight": torch.randn(rows, 2)}
    _rewrite(copy, base | updates)
    settings = json.loads((copy / "config.json").read_text()) | {"parrot_sys": {"lora": config_to_dict(lora)}}
    (copy / "config.json").write_text(json.dumps(settings))
    main(["--checkpoint", str(copy), "--output", str(tmp_path / "plain")])
    _assert_equal(_tensors(tmp_path / "plain"), base | updates)

    main(["--checkpoint", str(copy), "--output", str(tmp_path / "one"), "--merge-lora", "--format", form])
    main(["--checkpoint", str(tmp_path / "one"), "--output", str(tmp_path / "out")])
    merged = _tensors(tmp_path / "out")
    assert merged.keys() == base.keys()
    for name, tensor in base.items():
        if not name.endswith("k_proj.weight"):
            assert torch.equal(merged[name], tensor), name
    a, b = (updates[f"{layer}.lora_{which}.weight"].double() for which in "AB")
    exact = base[f"{layer}.weight"].double() + 1.5 * (b @ a)
    assert (merged[f"{layer}.weight"] - exact).abs().max() <= 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    with pytest.raises(CheckpointError, match="needs a checkpoint with LoRA"):
        main(["--checkpoint", str(tmp_path / "out"), "--output", str(tmp_path / "no"), "--merge-lora"])


def test_through_a_training_checkpoint(tmp_path: Path) -> None:
    steps = [str(FIXTURE / "model"), str(tmp_path / "trained"), str(tmp_path / "again")]
    main(["--checkpoint", steps[0], "--output", steps[1], "--format", "megatron"])
    main(["--checkpoint", steps[1], "--output", steps[2]])
    _assert_equal(_tensors(Path(steps[2])), _tensors(FIXTURE / "model"))
    config = load_config(ParrotConfig, Path(steps[1]) / "model_config.yaml")
    assert parrot_sys.load_pretrained(steps[2])[0].config.moe == config.moe
    ids = torch.tensor([[5, 6, 7]])
    logits = [parrot_sys.load_pretrained(step)[0](ids).logits for step in steps]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    for step in steps:
        processor = parrot_sys.load_pretrained(step)[1]
        assert processor.tokenizer.eos_token_id == 632
        assert processor.image_processor.to_dict()["image_aspect_ratio"] == "pad"


@pytest.mark.parametrize("form", ["safetensors-shards", "bin", "bin-shards"])
def test_forms_of_files(form: str, copy: Path, tmp_path: Path) -> None:
    tensors = _tensors(copy)
    (copy / "model.safetensors").unlink()
    if form == "bin":
        torch.save(tensors, copy / "pytorch_model.bin")
    else:
        _write_shards(copy, tensors, suffix="safetensors" if form.startswith("safe") else "bin")
    model, processor = parrot_sys.load_pretrained(copy)
    _assert_equal(model.hf_state_dict(), tensors)
    save_pretrained(model, processor, tmp_path / "out")
    _assert_equal(_tensors(tmp_path / "out"), tensors)


def _write_shards(directory: Path, tensors: dict[str, Tensor], *, suffix: str) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    keys, weight_map = sorted(tensors), {}
    for number in range(3):
        name = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        part = {key: tensors[key] for key in keys[number::3]}
        save_file(part, directory / name) if suffix == "safetensors" else torch.save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def test_tower_beside_the_checkpoint(copy: Path, tmp_path: Path) -> None:
    tensors = _tensors(copy)
    outside = {key: tensor for key, tensor in tensors.items() if "vision_tower" not in key}
    _rewrite(copy, outside)
    model, processor = parrot_sys.load_pretrained(copy)
    _assert_equal(model.hf_state_dict(), outside)
    beside = load_file(FIXTURE / "clip-vit-tiny" / "model.safetensors")
    name = "vision_model.embeddings.patch_embedding.weight"
    assert torch.equal(model.model.vision_tower.patch_embedding.weight, beside[name])
    save_pretrained(model, processor, tmp_path / "away" / "out")
    _assert_equal(_tensors(tmp_path / "away" / "out"), outside)
    again, _ = parrot_sys.load_pretrained(tmp_path / "away" / "out")  # the tower went along
    assert torch.equal(again.model.vision_tower.patch_embedding.weight, beside[name])


def test_tensors_that_the_model_does_not_use_survive(copy: Path, tmp_path: Path) -> None:
    """Buffers that older transformers versions saved."""
    tensors = _tensors(copy)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(8.0)
    tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    _rewrite(copy, tensors)
    main(["--checkpoint", str(copy), "--output", str(tmp_path / "out")])
    _assert_equal(_tensors(tmp_path / "out"), tensors)


def test_bypassed_experts_survive(tmp_path: Path) -> None:
    """A first-stage checkpoint holds experts that it does not use; the second stage needs them."""
    state = write_checkpoint(ReleasedParrot(Shape(use_moe=False)), tmp_path / "in")
    assert any("moe_model" in key for key in state)
    main(["--checkpoint", str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    _assert_equal(_tensors(tmp_path / "out"), state)


def test_dtypes(copy: Path, tmp_path: Path) -> None:
    """Mixed files stay mixed; an asked-for type is the type of everything."""
    tensors = _tensors(copy)
    mixed = {key: tensor if "vision_tower" in key else tensor.bfloat16() for key, tensor in tensors.items()}
    _rewrite(copy, mixed)
    model, _processor = parrot_sys.load_pretrained(copy)
    assert model.dtype == torch.float32
    _assert_equal(model.hf_state_dict(), mixed)
    main(["--checkpoint", str(copy), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"])
    _assert_equal(_tensors(tmp_path / "out"), {key: tensor.bfloat16() for key, tensor in mixed.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert parrot_sys.load_pretrained(tmp_path / "out")[0].dtype == torch.bfloat16
    assert parrot_sys.load_pretrained(tmp_path / "out", dtype="float32")[0].dtype == torch.float32


def test_wrong_tensors_are_listed(copy: Path) -> None:
    tensors = _tensors(copy)
    missing, misshaped = "model.layers.1.mlp.up_proj.weight", "model.moe_model.gate.weight"
    del tensors[missing]
    tensors[misshaped] = tensors[misshaped][:, :5].contiguous()
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)
    _rewrite(copy, tensors)
    with pytest.raises(CheckpointError) as error:
        parrot_sys.load_pretrained(copy)
    text = str(error.value)
    assert "1 missing:\n  model.layers.1.mlp.up_proj.weight [128, 64]" in text
    assert "1 unexpected:\n  model.layers.2.mlp.up_proj.weight [2, 2]" in text
    assert "1 with another shape:\n  model.moe_model.gate.weight: wanted [6, 64], got [6, 5]" in text


def test_damaged_files(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        parrot_sys.load_pretrained(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        parrot_sys.load_pretrained(copy)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors is missing"):
        parrot_sys.load_pretrained(copy)
    save_file({"other": torch.zeros(1)}, copy / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"their files lack: \['lm_head.weight'\]"):
        parrot_sys.load_pretrained(copy)


def test_existing_output(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    (out / "config.json").write_text("{}")  # an older export
    arguments = ["--checkpoint", str(copy), "--output", str(out)]
    with pytest.raises(CheckpointError, match="exists already"):
        main(arguments)
    assert (out / "precious").exists()
    main([*arguments, "--force"])
    assert not (out / "precious").exists()
    assert (out / "config.json").exists()
    assert f"wrote {out}" in capsys.readouterr().out


def test_failed_export_leaves_nothing(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = parrot_sys.load_pretrained(copy)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("parrot_sys.systems.export.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(model, processor, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip-vit-tiny", "model"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "parrot convert --checkpoint" in text
    assert "--dtype" in text


def test_run_of_the_first_stage(tmp_path: Path) -> None:
    """A run's newest checkpoint is taken, and its experts are passed by when the run did not use them."""
    for step in (1, 12):
        main(
            [
                "--checkpoint",
                str(FIXTURE / "model"),
                "--output",
                str(tmp_path / f"run/checkpoints/step-{step:08d}"),
                "--format",
                "megatron",
            ]
        )
    (tmp_path / "run/checkpoints/step-00000012/config.yaml").write_text("use_moe: false\n")
    model, _ = parrot_sys.load_pretrained(tmp_path / "run")
    assert model.model.moe is not None
    assert model.model.bridge.bypass == {"moe"}
    assert parrot_sys.load_pretrained(tmp_path / "run/checkpoints/step-00000001")[0].model.bridge.num_routed_experts


def test_only_checkpoints_are_replaced(copy: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"precious is no checkpoint .* it is not replaced"):
        main(["--checkpoint", str(copy), "--output", str(precious), "--force"])
    assert (precious / "thesis.txt").read_text() == "years of work"
    for output in (copy, copy / "inside", copy.parent):
        with pytest.raises(CheckpointError, match=r"must lie outside the checkpoint|is no checkpoint"):
            main(["--checkpoint", str(copy), "--output", str(output), "--force"])
    assert (copy / "model.safetensors").is_file()
