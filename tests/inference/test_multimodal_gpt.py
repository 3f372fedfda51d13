"""MultiModal-GPT from its released files: against the released code's outputs and, in other shapes, a plain model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import parrot_sys
from parrot_sys.errors import CheckpointError, DataError
from parrot_sys.inference.convert import ConvertConfig, convert
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.inference.pretrained import save_pretrained
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.models.flamingo_reference import ReleasedMultimodalGpt, Shape, mean_loss
from tests.support.tiny_systems import flamingo_parts

FIXTURE = Path(__file__).parents[1] / "fixtures" / "mmgpt_tiny"
PARTS: dict[str, Any] = {
    "llm": FIXTURE / "llama",
    "flamingo": FIXTURE / "open_flamingo.pt",
    "lora": FIXTURE / "mmgpt-lora.pt",
    "vision": FIXTURE / "clip-vit-tiny",
}


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("mmgpt") / "model"
    convert(ConvertConfig(source_format="multimodal_gpt", output=output, **PARTS))
    return output


@pytest.fixture(scope="module")
def tiny(directory: Path) -> ParrotForConditionalGeneration:
    return parrot_sys.load_pretrained(directory)[0]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FIXTURE / "expected.safetensors")


def _relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@pytest.mark.parametrize("name", ["one_image", "two_images", "text_only"])
def test_fixture(tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor], name: str) -> None:
    facts = {batch["name"]: batch for batch in json.loads((FIXTURE / "expected.json").read_text())["batches"]}
    ids, labels, images = (expected.get(f"{name}.{part}") for part in ("input_ids", "labels", "vision_x"))
    tiny.zero_grad()
    output = tiny(ids, images=images, labels=labels)
    assert abs(output.loss.item() - facts[name]["loss"]) < 1e-4
    assert _relative(output.logits, expected[f"{name}.logits"]) < 1e-4
    output.loss.backward()
    gradients = tiny.hf_gradients()
    prefix = f"{name}.grad."
    names = [key.removeprefix(prefix) for key in expected if key.startswith(prefix)]
    assert len(names) == (8 if images is None else 18)
    for key in names:
        assert _relative(gradients[key], expected[prefix + key]) < 1e-3, key


def test_images_one_behind_the_other(tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor]) -> None:
    ids, images = expected["two_images.input_ids"], expected["two_images.vision_x"]
    wanted = expected["two_images.logits"]
    assert _relative(tiny(ids, images=images.flatten(0, 2)).logits, wanted) < 1e-4
    assert _relative(tiny(torch.where(ids == 199, -200, ids), images=list(images.flatten(0, 2))).logits, wanted) < 1e-4


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor], use_cache: bool) -> None:
    ids, images = expected["generate.input_ids"], expected["generate.vision_x"]
    wanted = expected["generate.output_ids"]
    count = wanted.shape[1] - ids.shape[1]
    output = tiny.generate(ids, images=images, max_new_tokens=count, use_cache=use_cache)
    assert torch.equal(output, wanted)


def test_mixed_batch(tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor]) -> None:
    """Samples with and without images side by side: the text-only one passes the gated blocks as it is."""
    ids = torch.zeros(2, 30, dtype=torch.int64)
    ids[0], ids[1, :24] = expected["one_image.input_ids"][0], expected["text_only.input_ids"][0]
    mask = torch.ones_like(ids)
    mask[1, 24:] = 0
    output = tiny(ids, mask, images=expected["one_image.vision_x"]).logits
    assert _relative(output[0], expected["one_image.logits"][0]) < 1e-4
    assert _relative(output[1, :24], expected["text_only.logits"][0]) < 1e-4


@pytest.mark.parametrize("compat", [None, "paper"])
def test_cached_decoding(directory: Path, expected: dict[str, Tensor], compat: Any) -> None:
    """Rows behind the prefill read what they would read in one pass, also when requests leave the batch."""
    model, _ = parrot_sys.load_pretrained(directory, compat=compat)
    prompts = torch.cat([expected["two_images.input_ids"][:, :25], torch.full((2, 3), 50)], 1)
    ids = torch.cat([prompts, torch.randint(3, 190, (1, 28))])
    images = expected["two_images.vision_x"].flatten(0, 2)
    free = model.generate(ids, torch.ones_like(ids), images, max_new_tokens=6, eos_token_id=[])
    stop = int(free[0, 29])
    output = model.generate(ids, torch.ones_like(ids), images, max_new_tokens=6, eos_token_id=stop, pad_token_id=0)
    for row in range(len(ids)):
        pixels = images[2 * row : 2 * row + 2] if row < 2 else None
        tokens = ids[row : row + 1]
        for _ in range(6):
            following = model(tokens, images=pixels).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], 1)
            if following.item() == stop:
                break
        length = tokens.shape[1]
        assert torch.equal(output[row, :length], tokens[0]), row


def test_rules_differ(directory: Path, expected: dict[str, Tensor]) -> None:
    ids, images = expected["one_image.input_ids"], expected["one_image.vision_x"]
    logits = {
        compat: parrot_sys.load_pretrained(directory, compat=compat)[0](ids, images=images).logits
        for compat in ("released", "paper")
    }
    assert _relative(logits["released"], expected["one_image.logits"]) < 1e-4
    assert _relative(logits["paper"][:, -1], logits["released"][:, -1]) > 1e-2


def test_saved_again_it_is_the_same(directory: Path, tiny: ParrotForConditionalGeneration, tmp_path: Path) -> None:
    _, processor = parrot_sys.load_pretrained(directory)
    save_pretrained(tiny, processor, tmp_path / "again")
    for name in ("model.safetensors", "vision_tower/model.safetensors"):
        before, after = load_file(directory / name), load_file(tmp_path / "again" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (directory / "config.json").read_text()
    )
    released = torch.load(PARTS["flamingo"], weights_only=True) | load_file(PARTS["llm"] / "model.safetensors")
    held = load_file(directory / "model.safetensors")
    assert all(torch.equal(held[key], value) for key, value in released.items())


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> dict[str, Path]:
    return flamingo_parts(tmp_path)


def test_tokenizer_gets_the_added_tokens(with_tokenizer: dict[str, Path], tmp_path: Path) -> None:
    convert(ConvertConfig(source_format="multimodal_gpt", output=tmp_path / "model", **with_tokenizer))
    model, processor = parrot_sys.load_pretrained(tmp_path / "model")
    names = ("<|endofchunk|>", "<image>", "<PAD>")
    assert [processor.tokenizer.convert_tokens_to_ids(name) for name in names] == [40, 41, 42]
    assert (model.config.llm.vocab_size, model.config.flamingo.image_token_id) == (43, 41)
    assert (model.eos_token_ids[-1], model.pad_token_id) == (2, 42)
    before = load_file(with_tokenizer["llm"] / "model.safetensors")
    held = load_file(tmp_path / "model" / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(held[key][:40], before[key])
        torch.testing.assert_close(held[key][40:], before[key].mean(0).expand(3, -1))
    turns = [{"from": "human", "value": "<image>\nw1 w2"}, {"from": "gpt", "value": "w3"}]
    ids = processor.format_conversation(turns)["input_ids"]
    assert ids.count(-200) == 1
    assert model(torch.tensor([ids]), images=torch.randn(1, 3, 28, 28)).logits.shape == (1, len(ids), 43)


def test_image_token_without_a_tokenizer(
    with_tokenizer: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenFlamingo trained an embedding with its three tokens behind LLaMA's; the second is the image."""
    for file in with_tokenizer["llm"].glob("*token*"):
        file.unlink()
    tensors = torch.load(with_tokenizer["flamingo"], weights_only=True)
    for name in ("lang_encoder.model.embed_tokens.weight", "lang_encoder.lm_head.weight"):
        tensors[name] = torch.randn(
            43, load_file(with_tokenizer["llm"] / "model.safetensors")["lm_head.weight"].shape[1]
        )
    torch.save(tensors, with_tokenizer["flamingo"])
    output = tmp_path / "new" / "model"
    with caplog.at_level("WARNING"):
        convert(ConvertConfig(source_format="multimodal_gpt", output=output, dtype="float32", **with_tokenizer))
    model, _ = parrot_sys.load_pretrained(output)
    assert (model.config.llm.vocab_size, model.config.flamingo.image_token_id) == (43, 41)
    assert "<image> is taken to be token 41 of 43" in caplog.text


def test_vocabulary_for_several_ranks(directory: Path, expected: dict[str, Tensor], tmp_path: Path) -> None:
    settings = {"source_format": "multimodal_gpt", **PARTS}
    convert(ConvertConfig(output=tmp_path / "model", vocab_multiple=64, **settings))
    model, _ = parrot_sys.load_pretrained(tmp_path / "model")
    assert (model.config.llm.vocab_size, model.config.flamingo.image_token_id) == (256, 199)
    wanted = expected["generate.output_ids"]
    output = model.generate(expected["generate.input_ids"], images=expected["generate.vision_x"], max_new_tokens=8)
    assert torch.equal(output, wanted)


def test_training_checkpoint_and_back(with_tokenizer: dict[str, Path], tmp_path: Path) -> None:
    source = {"source_format": "multimodal_gpt", **with_tokenizer}
    convert(ConvertConfig(output=tmp_path / "released", **source))
    convert(ConvertConfig(output=tmp_path / "own", format="megatron", **source))
    convert(ConvertConfig(checkpoint=tmp_path / "own", output=tmp_path / "hf"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("released", "hf"))
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_text_needs_a_tokenizer(directory: Path) -> None:
    _, processor = parrot_sys.load_pretrained(directory)
    assert processor.images([]).shape == (0, 3, 56, 56)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        processor.tokenizer.decode([1])


def test_training_checkpoint_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"which needs a tokenizer, but .*llama holds none"):
        convert(ConvertConfig(source_format="multimodal_gpt", output=tmp_path / "own", format="megatron", **PARTS))
    assert not (tmp_path / "own").exists()


def test_wrong_images(tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor]) -> None:
    ids, images = expected["two_images.input_ids"], expected["one_image.vision_x"]
    with pytest.raises(DataError, match=r"k >= 2, the most markers of a sample, got \[2, 1, 1, 3, 56, 56\]"):
        tiny(ids, images=images)


SHAPES = {
    "every-layer": Shape(every=1, layers=2),
    "grouped-query-every-third": Shape(every=3, layers=5, kv_heads=2, gated_heads=1),
    "attends-to-previous": Shape(attend_previous=True, latents=7),
    "few-targets": Shape(targets=("q_proj", "v_proj", "to_kv"), rank=1, perceiver_heads=1, depth=1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    shape = SHAPES[name]
    reference = ReleasedMultimodalGpt(shape).eval()
    convert(ConvertConfig(source_format="multimodal_gpt", output=tmp_path / "model", **reference.write(tmp_path)))
    model, _ = parrot_sys.load_pretrained(tmp_path / "model", compat="paper" if shape.attend_previous else "released")
    marker = shape.vocab - 1
    rows = [torch.randint(3, marker, (size,)) for size in (9, 14, 11)]
    rows[0][4] = rows[1][2] = rows[1][7] = rows[1][9] = marker
    pixels = torch.randn(4, 3, shape.image_size, shape.image_size)
    labels = [torch.where(torch.arange(len(row)) > 5, row, -100) for row in rows]
    labels = [torch.where(row == marker, -100, label) for row, label in zip(rows, labels, strict=True)]
    logits = [reference.logits(rows[0], pixels[:1]), reference.logits(rows[1], pixels[1:])]
    logits.append(reference.logits(rows[2], None))
    wanted = mean_loss(logits, labels)
    wanted.backward()

    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    output = model(ids, mask, pixels, targets)
    assert abs(output.loss.item() - wanted.item()) < 1e-5
    for row, theirs in enumerate(logits):
        assert _relative(output.logits[row, : len(theirs)], theirs) < 1e-4
    output.loss.backward()
    gradients = model.hf_gradients()
    theirs = {key: value.grad for key, value in reference.lora.items()}
    theirs |= {f"perceiver.{key}": value.grad for key, value in reference.perceiver.named_parameters()}
    prefix = "lang_encoder.gated_cross_attn_layers."
    theirs |= {prefix + key: value.grad for key, value in reference.blocks.named_parameters()}
    theirs |= {key: value.grad for key, value in reference.llama.named_parameters()}
    assert gradients.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert _relative(gradients[key], gradient) < 1e-3, key


def _torch_file(path: Path, change: Any) -> Path:
    values = torch.load(PARTS["flamingo" if "flamingo" in path.name else "lora"], weights_only=True)
    change(values)
    torch.save(values, path)
    return path


class Unwanted:
    """What weights-only unpickling must refuse."""


def test_wrong_sources(tmp_path: Path) -> None:
    def fails(match: str, **changed: Any) -> None:
        settings = {"source_format": "multimodal_gpt", **PARTS, **changed}
        with pytest.raises(CheckpointError, match=match):
            convert(ConvertConfig(output=tmp_path / "out", **settings))
        assert not (tmp_path / "out").exists()

    fails("missing are --flamingo, --vision", flamingo=None, vision=None)
    fails("--checkpoint belong to the other format", checkpoint=tmp_path)
    fails("missing are --checkpoint; --llm, --flamingo, --lora, --vision belong", source_format="auto")
    fails(r"nowhere\.pt is missing", flamingo=tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    fails("text.pt", flamingo=tmp_path / "text.pt")
    fails(
        r"holds objects of \S*Unwanted, which are not loaded",
        flamingo=_torch_file(tmp_path / "open_flamingo.pt", lambda v: v.update(x=Unwanted())),
    )
    name = "perceiver.norm.bias"
    lacks = _torch_file(tmp_path / "open_flamingo.pt", lambda values: values.pop(name))
    fails(rf"1 missing:\n  {name} \[32\]", flamingo=lacks)
    more = _torch_file(tmp_path / "open_flamingo.pt", lambda values: values.update({"perceiver.new": torch.zeros(2)}))
    fails(r"1 unexpected:\n  perceiver.new \[2\]", flamingo=more)
    unsettled = _torch_file(tmp_path / "lora.pt", lambda values: values.pop("tuning_config"))
    fails("no tuning_config with lora_alpha", lora=unsettled)
    fails("model_type must be 'llama', got 'clip_vision_model'", llm=PARTS["vision"])


def test_without_lora(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    convert(ConvertConfig(source_format="multimodal_gpt", output=tmp_path / "model", **{**PARTS, "lora": None}))
    model, _ = parrot_sys.load_pretrained(tmp_path / "model")
    assert model.config.lora is None
    logits = model(expected["one_image.input_ids"], images=expected["one_image.vision_x"]).logits
    assert _relative(logits, expected["one_image.logits"]) > 1e-2


def test_merged_lora(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    convert(ConvertConfig(source_format="multimodal_gpt", output=tmp_path / "model", merge_lora=True, **PARTS))
    model, _ = parrot_sys.load_pretrained(tmp_path / "model")
    assert model.config.lora is None
    logits = model(expected["two_images.input_ids"], images=expected["two_images.vision_x"]).logits
    assert _relative(logits, expected["two_images.logits"]) < 1e-4
