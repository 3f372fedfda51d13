"""Text, ids and labels against the released formatter: its own outputs, and an independent rewrite of its rules."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.templates import TEMPLATES, render_conversation, render_instruction
from parrot_sys.errors import CheckpointError, DataError


@pytest.mark.parametrize("index", range(8))
def test_conversations_equal_the_released_ones(index, expected, processor):
    case = expected["conversations"][index]
    result = processor.format_conversation(case["source"]["conversations"])
    assert result["prompt"] == case["prompt"]
    assert result["input_ids"] == case["input_ids"]
    assert result["labels"] == case["labels"]
    assert all(type(i) is int for i in result["input_ids"] + result["labels"])


def test_every_conversation_of_the_fixture_is_compared(expected):
    assert len(expected["conversations"]) == 8


def test_generation_prompts_equal_the_released_ones(expected, processor):
    assert expected["generate"]
    for case in expected["generate"]:
        turns = [{"from": "human", "value": "<image>\n" + case["query"]}]
        result = processor.format_conversation(turns, add_generation_prompt=True)
        assert result["prompt"] == case["prompt"]
        assert result["input_ids"] == case["prompt_ids"]
        assert set(result["labels"]) == {IGNORE_ID}


def released_format(tokenizer, turns):
    """The rules in their plainest form: one turn after the other, one chunk after the other."""
    header = len(tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids)
    ids, labels = [], []
    for i, (role, text) in enumerate(turns):
        text = f"<|im_start|>{role}\n{text}<|im_end|>" + ("\n" if i < len(turns) - 1 else "")
        own = []
        for chunk in text.split("<image>"):
            own += [*tokenizer(chunk, add_special_tokens=False).input_ids, IMAGE_TOKEN_ID]
        own.pop()
        ids += own
        labels += [IGNORE_ID] * header + own[header:] if role == "assistant" else [IGNORE_ID] * len(own)
    return ids, labels


@pytest.mark.parametrize(
    "answers",
    [
        ["A cat."],
        ["\n\nA cat.", "Two\n"],  # newlines at the edges merge with those of the template
        ["Uma maçã", "三个苹果", "кошка 🐈"],
    ],
)
def test_several_turns_equal_a_plain_rewrite(answers, processor):
    turns, plain = [], [("system", "You are a helpful assistant.")]
    for i, answer in enumerate(answers):
        question = "<image>\nWhat?" if i == 0 else f"And {i}?"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        plain += [("user", question), ("assistant", answer)]
    result = processor.format_conversation(turns)
    ids, labels = released_format(processor.tokenizer, plain)
    assert result["input_ids"] == ids
    assert result["labels"] == labels


def test_labels_end_with_the_newline_except_in_the_last_turn(processor):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2
    result = processor.format_conversation(turns)
    learned = [i for i in result["labels"] if i != IGNORE_ID]
    assert processor.tokenizer.decode(learned) == "b<|im_end|>\nb<|im_end|>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("  Look <image> here ", "<image>\nLook  here"),
        ("<image>", "<image>"),
        ("  no marker ", "  no marker "),  # only turns with a marker are stripped
        ("<image> and <image>", "<image>\n<image>\nand"),  # every image keeps its marker
    ],
)
def test_markers_move_to_the_start_of_their_turn(text, wanted):
    (turn,) = render_conversation([{"from": "human", "value": text}])[1:]
    assert turn.text == f"<|im_start|>user\n{wanted}<|im_end|>"


def test_several_images_in_several_turns_keep_their_order(processor):
    turns = [
        {"from": "human", "value": "<image><image>\nboth?"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "and <image>?"},
        {"from": "gpt", "value": "no"},
    ]
    result = processor.format_conversation(turns)
    assert result["input_ids"].count(IMAGE_TOKEN_ID) == 3
    assert "user\n<image>\n<image>\nboth?" in result["prompt"]
    assert "user\n<image>\nand ?" in result["prompt"]


def test_a_given_system_turn_replaces_the_default():
    segments = render_conversation([{"from": "system", "value": "Be short."}, {"from": "human", "value": "Hi"}])
    assert (
        "".join(s.text for s in segments) == "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>"
    )


def test_the_callers_turns_are_not_changed(processor, turns):
    given = turns("<image>What?")
    processor.format_conversation(given, add_generation_prompt=True)
    assert given == turns("<image>What?")


@pytest.mark.parametrize(
    ("turns", "message"), [([], "at least one turn"), ([{"from": "user", "value": "x"}], "'user'")]
)
def test_wrong_turns_are_errors(turns, message, processor: ParrotProcessor):
    with pytest.raises(DataError, match=message):
        processor.format_conversation(turns)


@pytest.mark.parametrize("turn", [{"from": "human"}, {"from": "human", "value": None}, {"value": "x"}, "text"])
def test_a_turn_of_another_form_is_an_error(turn):
    with pytest.raises(DataError, match=r"turn 1 must be \{\"from\": \.\.\., \"value\": text\}, got"):
        render_conversation([{"from": "human", "value": "a"}, turn])


HEADER = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.fixture(scope="module")
def instruct(tmp_path_factory, parrot_tiny) -> ParrotProcessor:
    """A processor with a tokenizer like LLaMA's: a space before the text, bytes for newlines, no tokens of ChatML."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    lines = [HEADER, "### Instruction:", "What is it?", "### Response:", "It is a cat.", "### Image:", "0123456789"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(lines * 3, trainer)
    folder = tmp_path_factory.mktemp("instruct")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    values = json.loads((parrot_tiny / "clip-vit-tiny" / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(values | {"conversation_template": "instruction"}))
    return ParrotProcessor.from_pretrained(folder)


def test_instruction_text(instruct):
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Which one?", "input": "a, b"},
        {"from": "gpt", "value": "b"},
    ]
    assert instruct.format_conversation(turns)["prompt"] == (
        f"{HEADER}\n\n### Image:\n<image>\n\n### Instruction:\nWhat is it?\n\n### Response:\nA cat."
        "\n\n### Instruction:\nWhich one?\n\n### Input:\na, b\n\n### Response:\nb"
    )
    opened = instruct.format_conversation(turns[:1], add_generation_prompt=True)
    assert opened["prompt"].endswith("\n\n### Instruction:\nWhat is it?\n\n### Response:\n")
    text_only = [{"from": "human", "value": " Keep  this\n"}, {"from": "gpt", "value": "x"}]
    assert instruct.format_conversation(text_only)["prompt"] == (
        f"{HEADER}\n\n### Instruction:\n Keep  this\n\n\n### Response:\nx"
    )
    with_system = [{"from": "system", "value": "Be short."}, *text_only]
    assert instruct.format_conversation(with_system)["prompt"].startswith("Be short.\n\n### Instruction:")


def instruction_format(tokenizer, pairs):
    """The public code's rule for one question and answer (base_dataset.py, tokenize), for each pair of a dialogue.

    The text of a pair is tokenised as one; the instruction's ids, counted by tokenising it alone, bear no loss. The
    begin-of-sequence token stands once, not before each pair.
    """

    def ids_of(text):
        ids = []
        for chunk in text.split("<image>"):
            ids += [*tokenizer(chunk, add_special_tokens=False).input_ids, IMAGE_TOKEN_ID]
        return ids[:-1]

    ids, labels = [tokenizer.bos_token_id], [IGNORE_ID]
    for instruction, answer in pairs:
        own = [*ids_of(instruction + answer), tokenizer.eos_token_id]
        silent = len(ids_of(instruction))
        ids += own
        labels += [IGNORE_ID] * silent + own[silent:]
    return ids, labels


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("image", [False, True])
def test_every_question_is_learned_with_its_own_answer(count, image, instruct):
    turns, pairs = [], []
    for i in range(count):
        marker = "<image>\n" if image and i == 0 else ""
        turns += [{"from": "human", "value": f"{marker}What is {i}?"}, {"from": "gpt", "value": f"It is a cat {i}."}]
        head = HEADER if i == 0 else ""
        section = "\n\n### Image:\n<image>" if marker else ""
        pairs.append((f"{head}{section}\n\n### Instruction:\nWhat is {i}?\n\n### Response:\n", f"It is a cat {i}."))
    result = instruct.format_conversation(turns)
    ids, labels = instruction_format(instruct.tokenizer, pairs)
    assert result["input_ids"] == ids
    assert result["labels"] == labels
    eos = instruct.tokenizer.eos_token_id
    assert labels.count(eos) == count
    learned = [i for i in labels if i != IGNORE_ID]
    decoded = instruct.tokenizer.decode(learned)
    assert [part.strip() for part in decoded.split("</s>")] == [f"It is a cat {i}." for i in range(count)] + [""]
    assert ids.count(instruct.tokenizer.bos_token_id) == 1


def test_an_opened_answer_goes_on_as_in_training(instruct):
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "It is a cat."}]
    whole = instruct.format_conversation(turns)
    opened = instruct.format_conversation(turns[:1], add_generation_prompt=True)
    first_answer = next(i for i, label in enumerate(whole["labels"]) if label != IGNORE_ID)
    assert opened["input_ids"] == whole["input_ids"][:first_answer]


def test_the_format_is_kept_with_the_processor(instruct, processor, tmp_path):
    instruct.save_pretrained(tmp_path / "instruction")
    assert ParrotProcessor.from_pretrained(tmp_path / "instruction").template.name == "instruction"
    processor.save_pretrained(tmp_path / "chatml")
    assert ParrotProcessor.from_pretrained(tmp_path / "chatml").template.name == "chatml"
    assert "conversation_template" not in (tmp_path / "chatml" / "preprocessor_config.json").read_text()
    with pytest.raises(CheckpointError, match="special token"):
        ParrotProcessor.from_pretrained(tmp_path / "instruction", "chatml")


@pytest.mark.parametrize(
    ("froms", "message"),
    [(["gpt"], "beginning with human, got gpt"), (["human", "human"], "in turn"), (["system"], "got none")],
)
def test_turns_that_do_not_pair_are_errors(froms, message):
    with pytest.raises(DataError, match=message):
        render_instruction([{"from": name, "value": "x"} for name in froms])


VICUNA = (  # of LLaVA-1.5
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def test_vicuna_is_what_llava_was_trained_on(instruct):
    vicuna = ParrotProcessor(instruct.tokenizer, instruct.image_processor, TEMPLATES["vicuna"])
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "It is a cat."},
        {"from": "human", "value": " Which one? "},
        {"from": "gpt", "value": "It is a cat 2."},
    ]
    pairs = [
        (f"{VICUNA} USER: <image>\nWhat is it? ASSISTANT:", " It is a cat."),
        ("USER: Which one? ASSISTANT:", " It is a cat 2."),
    ]
    result = vicuna.format_conversation(turns)
    assert result["prompt"] == "".join(map("".join, pairs))
    assert (result["input_ids"], result["labels"]) == instruction_format(instruct.tokenizer, pairs)
    opened = vicuna.format_conversation(turns[:3], add_generation_prompt=True)
    assert opened["prompt"] == f"{''.join(pairs[0])}{pairs[1][0]}"
    assert opened["input_ids"] == result["input_ids"][: len(opened["input_ids"])]
    assert result["labels"][len(opened["input_ids"]) :] == result["input_ids"][len(opened["input_ids"]) :]
    short = vicuna.format_conversation([{"from": "system", "value": "Be short."}, *turns[:1]])
    assert short["prompt"] == "Be short. USER: <image>\nWhat is it?"


def test_a_checkpoint_of_transformers_has_the_format_of_its_tokenizer(instruct, processor, parrot_tiny, tmp_path):
    for name, tokenizer in (("vicuna", instruct.tokenizer), ("chatml", processor.tokenizer)):
        folder = tmp_path / name
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "x", "vision_config": {}}))
        values = json.loads((parrot_tiny / "clip-vit-tiny" / "preprocessor_config.json").read_text())
        for pads in (None, False, True):
            (folder / "preprocessor_config.json").write_text(json.dumps(values | {"do_pad": pads}))
            read = ParrotProcessor.from_pretrained(folder)
            assert (read.template.name, read.image_processor.pad_to_square) == (name, bool(pads))


def test_chatml_puts_the_input_below_the_instruction():
    text = "".join(s.text for s in render_conversation([{"from": "human", "value": "Sum up.", "input": "A text."}]))
    assert text.endswith("<|im_start|>user\nSum up.\nA text.<|im_end|>")


LLAMA3_TEMPLATE = (  # of Meta-Llama-3-8B-Instruct
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


@pytest.fixture
def llama3(tmp_path) -> ParrotProcessor:
    """A tokenizer with Llama 3's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["What is in the picture?"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[-1]).save_pretrained(
        tmp_path
    )
    return ParrotProcessor.for_tower(tmp_path, "siglip", 384, "llama3")


def test_llama3_is_the_models_own_template(llama3: ParrotProcessor):
    turns = [("system", "Be short."), ("human", "What? "), ("gpt", "A cat.\n"), ("human", "And?")]
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    messages = [{"role": roles[name], "content": text} for name, text in turns]
    wanted = llama3.tokenizer.apply_chat_template(messages, chat_template=LLAMA3_TEMPLATE, return_dict=False)
    result = llama3.format_conversation([{"from": n, "value": t} for n, t in turns], add_generation_prompt=True)
    assert result["input_ids"] == wanted
    answer = llama3.tokenizer("A cat.<|eot_id|>", add_special_tokens=False).input_ids
    assert [label for label in result["labels"] if label != IGNORE_ID] == answer
    picture = llama3.format_conversation([{"from": "human", "value": "Look<image>"}])["prompt"]
    assert "<|start_header_id|>user<|end_header_id|>\n\n<image>\nLook<|eot_id|>" in picture
    assert "You are a helpful assistant." in picture
