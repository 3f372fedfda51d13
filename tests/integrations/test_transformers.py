"""Exported directories through the Auto classes of transformers, against `load_pretrained` on the same directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    pipeline,
)

import parrot_sys
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.messages import turns_of
from parrot_sys.errors import CheckpointError, ConfigError, DataError
from parrot_sys.files import read_json
from parrot_sys.integrations.hugging_face import modeling
from parrot_sys.megatron.runtime.initialize import shutdown
from parrot_sys.systems.registry import RELEASED_TYPES
from tests.foreign_files import copy_fixture

FIXTURES = Path(__file__).parents[1] / "fixtures"
PICTURES = sorted((FIXTURES / "parrot_tiny").glob("image_*.png"))


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_fixture(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(directory)


@pytest.fixture(scope="module")
def processor(directory: Path) -> Any:
    return AutoProcessor.from_pretrained(directory)


@pytest.fixture(scope="module")
def ours(directory: Path) -> Any:
    return parrot_sys.load_pretrained(directory)


def asked(*texts: str, picture: bool = True) -> list[dict[str, Any]]:
    """A conversation that ends with a question."""
    content = [*([{"type": "image", "path": str(PICTURES[0])}] * picture), {"type": "text", "text": texts[-1]}]
    earlier = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts[:-1])]
    return [*earlier, {"role": "user", "content": content}]


def inputs_of(processor: Any, conversations: list[Any]) -> dict[str, Tensor]:
    batch = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt", padding=True
    )
    return dict(batch)


@pytest.mark.parametrize("first", ["parrot_sys", "transformers.models.auto.modeling_auto"])
def test_an_import_is_enough_in_any_order_and_imports_nothing(first: str, directory: Path) -> None:
    code = f"""
import sys, importlib
importlib.import_module({first!r})
if {first == "parrot_sys"}:
    assert not {{"torch", "transformers"}} & sys.modules.keys()
import parrot_sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
config = AutoConfig.from_pretrained({str(directory)!r})
assert type(config) in AutoModelForCausalLM._model_mapping
assert not [name for name in sys.modules if name.startswith("megatron")]
print(type(AutoProcessor.from_pretrained({str(directory)!r})).__name__, type(config).__module__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["ReleasedProcessor", "parrot_sys.integrations.hugging_face.configuration"]


def test_every_released_layout_has_a_class() -> None:
    for kind, system in RELEASED_TYPES.items():
        config = AutoConfig.for_model(kind)
        classes = (AutoModelForCausalLM, AutoModelForImageTextToText)
        names = {getattr(own._model_mapping.get(type(config), None), "__name__", None) for own in classes}
        assert system.model_types[kind] in names


@settings(max_examples=8)
@given(
    questions=st.lists(st.tuples(st.text("ab ?水1", max_size=6), st.booleans()), min_size=1, max_size=3),
    drawn=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 5]),
    min_p=st.sampled_from([0.0, 0.2]),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_answers_are_those_of_the_engine(
    model: Any,
    processor: Any,
    ours: Any,
    questions: list[tuple[str, bool]],
    drawn: bool,
    temperature: float,
    top_k: int,
    min_p: float,
    penalty: float,
) -> None:
    own_model, own_processor = ours
    conversations = [asked(text, picture=picture) for text, picture in questions]
    batch = inputs_of(processor, conversations)
    seeds = list(range(len(questions)))
    more = {"temperature": temperature, "top_k": top_k, "min_p": min_p} if drawn else {}
    config = GenerationConfig(max_new_tokens=5, do_sample=drawn, repetition_penalty=penalty, **more)
    found = model.generate(**batch, generation_config=config, seed=seeds)
    width = batch["input_ids"].shape[1]
    assert torch.equal(found[:, :width], batch["input_ids"])
    for row, (messages, (_, picture)) in enumerate(zip(conversations, questions, strict=True)):
        prompt = own_processor.format_conversation(turns_of(messages), add_generation_prompt=True)["input_ids"]
        alone = own_model.generate(
            torch.tensor([prompt]),
            images=own_processor.images([PICTURES[0]] * picture),
            max_new_tokens=5,
            do_sample=drawn,
            repetition_penalty=penalty,
            seed=seeds[row],
            **more,
        )[0, len(prompt) :].tolist()
        answer = found[row, width:].tolist()
        assert answer[: len(alone)] == alone
        assert set(answer[len(alone) :]) <= {own_model.pad_token_id}


def test_logits_loss_and_gradients_are_those_of_the_model(model: Any, processor: Any, ours: Any) -> None:
    batch = inputs_of(processor, [asked("What is it?", "A cat.", "And now?"), asked("b", picture=False)])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_ID)
    labels = labels.masked_fill(labels == IMAGE_TOKEN_ID, IGNORE_ID)
    output = model(**batch, labels=labels)
    expected = ours[0](batch["input_ids"], batch["attention_mask"], batch["pixel_values"], labels)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    output.loss.backward()
    expected.loss.backward()
    theirs = dict(model.parrot.named_parameters())
    learned = [name for name, own in ours[0].named_parameters() if own.grad is not None]
    assert learned
    assert all(torch.equal(theirs[name].grad, own.grad) for name, own in ours[0].named_parameters() if name in learned)
    model.zero_grad()


@pytest.mark.parametrize("settings", [{}, {"device_map": "cpu"}, {"model_kwargs": {"device_map": "cpu"}}])
def test_the_pipeline_answers_as_the_model(settings: dict[str, Any], directory: Path, ours: Any) -> None:
    own_model, own_processor = ours
    messages = asked("What is it?")
    pipe = pipeline("image-text-to-text", model=str(directory), **settings)
    found = pipe(text=messages, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    prompt = own_processor.format_conversation(turns_of(messages), add_generation_prompt=True)["input_ids"]
    pixels = own_processor.images([PICTURES[0]])
    tokens = own_model.generate(torch.tensor([prompt]), images=pixels, max_new_tokens=6)[0, len(prompt) :]
    assert found == own_processor.tokenizer.decode(tokens, skip_special_tokens=True)
    # A prompt that is written out, with its picture beside it.
    text = own_processor.format_conversation(turns_of(messages), add_generation_prompt=True)["prompt"]
    again = pipe(images=[Image.open(PICTURES[0])], text=text, max_new_tokens=6, return_full_text=False)
    assert again[0]["generated_text"] == found


def test_a_stop_string_ends_an_answer(model: Any, processor: Any) -> None:
    batch = inputs_of(processor, [asked("What is it?")])
    width = batch["input_ids"].shape[1]
    whole = model.generate(**batch, max_new_tokens=8)[0, width:]
    text = processor.decode(whole)
    stop = text[4:6]
    ended = model.generate(**batch, max_new_tokens=8, stop_strings=stop, tokenizer=processor.tokenizer)[0, width:]
    assert len(ended) < len(whole)
    assert torch.equal(ended, whole[: len(ended)])
    assert stop in processor.decode(ended)
    assert stop not in processor.decode(ended[:-1])
    with pytest.raises(ConfigError, match="tokenizer"):
        model.generate(**batch, max_new_tokens=8, stop_strings=stop)


REFUSED: dict[str, Any] = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "typical_p": 0.5,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 2,
    "bad_words_ids": [[1]],
    "output_scores": True,
    "return_dict_in_generate": True,
    "guidance_scale": 2.0,
    "logits_processor": [len],
    "stopping_criteria": [len],
    "assistant_model": "x",
    "past_key_values": [1],
    "inputs_embeds": torch.zeros(1, 1, 1),
    "pixel_valuse": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_does_not_do_is_refused_by_name(model: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):  # ConfigError, or transformers' own where it refuses it first
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=1, **{name: REFUSED[name]})


def test_settings_that_ask_for_nothing_are_taken(model: Any) -> None:
    ids = torch.tensor([[5, 6]])
    neutral = {"num_beams": 1, "num_return_sequences": 1, "length_penalty": 1.0, "logits_processor": None}
    assert model.generate(ids, max_new_tokens=2, **neutral).shape == (1, 4)
    assert model.generate(ids, max_length=5).shape[1] <= 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"quantization_config": {"a": 1}}, "quantization_config"),
        ({"attn_implementation": "sdpa"}, "attn_implementation"),
        ({"device_map": {"a": 0, "b": 1}}, "device_map"),
        ({"num_experts": 3}, "num_experts"),
    ],
)
def test_what_loading_does_not_do_is_refused_by_name(directory: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        AutoModelForCausalLM.from_pretrained(directory, **arguments)


def test_what_comes_where_peft_is_installed_is_taken(directory: Path) -> None:
    model = {own.config_class.model_type: own for own in modeling.MODELS}["parrot_qwen2"]
    assert model.from_pretrained(directory, adapter_kwargs={"revision": None, "token": None}).device.type == "cpu"
    with pytest.raises(ConfigError, match="adapter_kwargs"):
        model.from_pretrained(directory, adapter_kwargs={"_adapter_model_path": "adapter"})


def test_other_calls_that_have_no_meaning_are_refused(model: Any, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="from_pretrained"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    for asked, move in (
        ("bfloat16", lambda: model.to(torch.bfloat16)),
        ("bfloat16", model.bfloat16),
        ("float16", model.half),
        ("float64", model.double),
        ("meta", lambda: model.to("meta")),
        ("load it with device_map", model.cuda),
    ):
        with pytest.raises(ConfigError, match=asked):
            move()
    assert {parameter.dtype for parameter in model.parameters()} == {model.dtype}
    assert model.to("cpu") is model.cpu() is model.float() is model
    with pytest.raises(ConfigError, match="output_attentions"):
        model(torch.tensor([[5, 6]]), output_attentions=True)
    with pytest.raises(ConfigError, match="push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(CheckpointError, match="no directory"):
        type(model).from_pretrained("somebody/model")


def test_pictures_and_markers_must_fit(processor: Any) -> None:
    with pytest.raises(DataError, match="got 0"):
        processor(text="<image>\na")
    with pytest.raises(DataError, match="padding"):
        processor(text=["a", "a b c d"], return_tensors="pt")
    with pytest.raises(ConfigError, match="max_length"):
        processor(text="a", max_length=3)


@pytest.mark.parametrize("name", ["parrot_tiny", "wings_tiny"])
def test_a_saved_model_is_the_loaded_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / name, tmp_path / "given")
    given_folder, saved, again = tmp_path / "given" / "model", tmp_path / "saved", tmp_path / "again"
    saved.mkdir()
    (saved / "trainer_state.json").write_text("{}")
    loaded = AutoModelForCausalLM.from_pretrained(given_folder)
    loaded.save_pretrained(saved)
    assert (saved / "trainer_state.json").is_file()
    AutoModelForImageTextToText.from_pretrained(saved, dtype="auto").save_pretrained(again)
    for one, other in ((given_folder, saved), (saved, again)):
        before, after = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert read_json(one / "config.json") == read_json(other / "config.json")
    for file in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        assert (given_folder / file).read_bytes() == (again / file).read_bytes()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_training_changed_is_saved(directory: Path, tmp_path: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([[5, 6, 7, 8]])
    trained.train()
    trained(ids, labels=ids).loss.backward()
    torch.optim.SGD([own for own in trained.parameters() if own.requires_grad], lr=0.5).step()
    trained.save_pretrained(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    before = AutoModelForCausalLM.from_pretrained(directory)
    trained.eval()
    assert torch.equal(again(ids).logits, trained(ids).logits)
    assert not torch.equal(again(ids).logits, before(ids).logits)


def test_the_processor_is_saved_and_read(processor: Any, tmp_path: Path, directory: Path) -> None:
    shutil.copyfile(directory / "config.json", tmp_path / "config.json")
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    one, other = (inputs_of(each, [asked("What?"), asked("b", picture=False)]) for each in (processor, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert again.tokenizer.chat_template == processor.chat_template
