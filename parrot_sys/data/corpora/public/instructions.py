"""Public instruction data in the files they were published as -> records of this project (`records.py`).

Which sets and how they become instructions follows MultiModal-GPT (arXiv 2305.04790, section 4.1;
open-mmlab/Multimodal-GPT, mmgpt/datasets), apart from its mistakes: options are shown where they are drawn, and every
question of a dialogue goes with its own answer. VQAv2 is here because the paper leaves it out: its answers of a word or
two make a model terse.

| name | file | images |
|---|---|---|
| llava | LLaVA-Instruct's `conversation_58k.json`, `detail_23k.json`, `complex_reasoning_77k.json` (list) | COCO |
| aokvqa | `aokvqa_v1p0_train.json` (list) | COCO |
| minigpt4 | cc_sbu_align's `filter_cap.json` (`annotations`) | `image/ID.jpg` |
| coco_caption | Karpathy's `dataset_coco.json` (`images`) or LAVIS' `coco_karpathy_train.json` (list) | COCO 2014 |
| ocr_vqa | `dataset.json` (book -> questions, answers, split) | `images/BOOK.EXT` |
| vqa_v2 | `v2_mscoco_train2014_annotations.json`, the questions in a file of their own | COCO 2014 |
| dolly | `databricks-dolly-15k.jsonl` | - |
| alpaca | `alpaca_data.json`, `alpaca_gpt4_data.json` (list) | - |
| baize | `quora_chat_data.json` and its siblings (list of `input`) | - |
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.corpora.public.base import (
    Example,
    Row,
    Source,
    ask,
    kind_of,
    lack,
    load_json,
    place_of,
    reply,
    rows_below,
    text_of,
    texts_of,
)
from parrot_sys.data.record_files import read_raw_records
from parrot_sys.errors import DataError

WHY = ("Why?", "Why is this?", "And why?", "What is the reason?", "Can you tell me why?", "Can you tell me the reason?")
"""One of these follows a question of A-OKVQA, whose answer gives reasons."""
CAPTION_PROMPTS = (
    "Describe the image.",
    "Describe this image briefly.",
    "What does the image show?",
    "What can be seen in the picture?",
    "What is in the picture?",
    "Give a short description of the image.",
    "Write a caption for this image.",
    "Write one sentence about the picture.",
    "Summarize what the picture shows.",
    "Say in a few words what the photo is about.",
    "Give the image a caption.",
    "Tell me what you see in this photo.",
    "What is happening in this image?",
    "Provide a one-sentence description of this picture.",
    "How would you caption this photo?",
    "Put the content of this image into words.",
)
DETAIL_PROMPTS = (
    "Describe the image in detail.",
    "Describe this image as precisely as you can.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
    "What do you see in this picture? Be thorough.",
    "Explain in detail what the picture shows.",
    "Give a full account of everything in this image.",
)


def _coco_names(image_id: int) -> list[str]:
    """Paths where COCO's image may be: its 2017 and 2014 names, with and without the folder of the split."""
    names = [f"{image_id:012d}.jpg", *(f"{split}2017/{image_id:012d}.jpg" for split in ("train", "val"))]
    for split in ("train", "val"):
        old = f"COCO_{split}2014_{image_id:012d}.jpg"
        names += [old, f"{split}2014/{old}"]
    return names


def _llava(row: Row, _: random.Random) -> Example:
    image = row.get("image")
    names = [] if image is None else [image]
    # COCO's ids have twelve digits; other sets number their pictures as well.
    if image is not None and re.fullmatch(r"\d{12}\.jpg", Path(image).name) is not None:
        names += _coco_names(int(Path(image).stem))
    turns = row["conversations"]
    if image is not None and isinstance(turns, list) and not any(IMAGE_TOKEN in turn["value"] for turn in turns):
        raise DataError(f"has an image, but no turn has the marker {IMAGE_TOKEN}")
    return Example(turns=turns, images=names, record_id=str(row["id"]))


def _aokvqa(row: Row, generator: random.Random) -> Example:
    choices = texts_of(row, "choices")
    right = place_of(row["correct_choice_idx"], "correct_choice_idx", len(choices))
    question = f"{text_of(row, 'question')} {generator.choice(WHY)}"
    reasons = " ".join(texts_of(row, "rationales"))
    answer = f"The answer is {choices[right]}. Because {reasons}"
    options = ", ".join(choices) if generator.random() < 0.5 else ""
    return Example(
        turns=[ask(question, image=True, about=options), reply(answer)],
        images=_coco_names(int(row["image_id"])),
        record_id=str(row["question_id"]),
    )


def _minigpt4(row: Row, generator: random.Random) -> Example:
    name = str(row["image_id"])
    turns = [ask(generator.choice(DETAIL_PROMPTS), image=True), reply(text_of(row, "caption"))]
    return Example(turns=turns, images=[f"{name}.jpg", f"image/{name}.jpg"], record_id=name)


def _read_coco_caption(path: Path) -> Iterator[Any]:
    values = load_json(path)
    if isinstance(values, list):  # LAVIS: a caption a row
        yield from values
        return
    for index, image in enumerate(rows_below(path, "images")):
        try:
            if image["split"] not in ("train", "restval"):
                continue
            captions = [
                {
                    "caption": sentence["raw"],
                    "image": f"{image['filepath']}/{image['filename']}",
                    "image_id": f"{image['cocoid']}-{sentence['sentid']}",
                }
                for sentence in image["sentences"]
            ]
        except (KeyError, TypeError) as error:
            yield DataError(f"image {index} of the file is none of Karpathy's: {lack(error)}")
            continue
        yield from captions


def _coco_caption(row: Row, generator: random.Random) -> Example:
    image = text_of(row, "image")
    turns = [ask(generator.choice(CAPTION_PROMPTS), image=True), reply(text_of(row, "caption"))]
    return Example(turns=turns, images=[image, Path(image).name], record_id=str(row["image_id"]))


def _read_ocr_vqa(path: Path) -> Iterator[Any]:
    books = load_json(path)
    if not isinstance(books, Mapping):
        raise DataError(f"{path} must hold a JSON object of books, got {type(books).__name__}")
    for name, book in books.items():
        if not isinstance(book, Mapping) or "split" not in book:
            yield DataError(f"book {name} must be an object with a split, got {kind_of(book)}")
        elif book["split"] == 1:  # 2 validation, 3 test
            yield {"book": name, **book}


def _ocr_vqa(row: Row, generator: random.Random) -> Example:
    questions, answers = texts_of(row, "questions"), texts_of(row, "answers")
    if len(questions) != len(answers):
        raise DataError(f"must have as many answers as questions, got {len(questions)} and {len(answers)}")
    question, answer = generator.choice(list(zip(questions, answers, strict=True)))
    name = f"{row['book']}{Path(row['imageURL']).suffix}"
    turns = [ask(question, image=True), reply(answer)]
    return Example(turns=turns, images=[name, f"images/{name}"], record_id=str(row["book"]))


def _read_vqa_v2(path: Path, questions: Path) -> Iterator[Any]:
    texts = {row["question_id"]: row["question"] for row in rows_below(questions, "questions")}
    for row in rows_below(path, "annotations"):
        yield {**row, "question": texts.get(row.get("question_id"))}


def _vqa_v2(row: Row, _: random.Random) -> Example:
    turns = [ask(text_of(row, "question"), image=True), reply(text_of(row, "multiple_choice_answer"))]
    return Example(turns=turns, images=_coco_names(int(row["image_id"])), record_id=str(row["question_id"]))


def _instruction(instruction: str, about: str, answer: str) -> Callable[[Row, random.Random], Example]:
    """Rows with an instruction, what it is about (may be empty) and an answer, in fields of these names."""

    def convert(row: Row, generator: random.Random) -> Example:
        question = ask(text_of(row, instruction), about=text_of(row, about, empty=True))
        return Example(turns=[question, reply(text_of(row, answer))], record_id="")

    return convert


_BAIZE_SPEAKERS = re.compile(r"\[\|(Human|AI)\|\]")


def _baize(row: Row, _: random.Random) -> Example:
    rest = _BAIZE_SPEAKERS.split(row["input"])[1:]  # before the first speaker is the text that all rows begin with
    said = [(speaker, text.strip()) for speaker, text in zip(rest[::2], rest[1::2], strict=True)]
    if said and said[-1][0] == "Human":  # every row ends with a question that nobody answers, mostly an empty one
        said.pop()
    if any(not text for _, text in said):
        raise DataError("a turn before the last has no text")
    turns = [ask(text) if speaker == "Human" else reply(text) for speaker, text in said]
    return Example(turns=turns, record_id="")


INSTRUCTIONS: Mapping[str, Source] = {
    "llava": Source(
        read=read_raw_records, convert=_llava, has_images=True, wanted='{"id", "image", "conversations": [...]}'
    ),
    "aokvqa": Source(
        read=read_raw_records,
        convert=_aokvqa,
        has_images=True,
        wanted='{"question_id", "image_id", "question", "choices", "correct_choice_idx", "rationales"}',
    ),
    "minigpt4": Source(
        read=lambda path: iter(rows_below(path, "annotations")),
        convert=_minigpt4,
        has_images=True,
        wanted='{"image_id", "caption"}',
    ),
    "coco_caption": Source(
        read=_read_coco_caption, convert=_coco_caption, has_images=True, wanted='{"image", "image_id", "caption"}'
    ),
    "ocr_vqa": Source(
        read=_read_ocr_vqa, convert=_ocr_vqa, has_images=True, wanted='{"imageURL", "questions", "answers", "split"}'
    ),
    "vqa_v2": Source(
        read=_read_vqa_v2,
        convert=_vqa_v2,
        has_images=True,
        wanted='{"question_id", "image_id", "multiple_choice_answer"} and a question of that id in the other file',
    ),
    "dolly": Source(
        read=read_raw_records,
        convert=_instruction("instruction", "context", "response"),
        has_images=False,
        wanted='{"instruction", "context", "response"}',
    ),
    "alpaca": Source(
        read=read_raw_records,
        convert=_instruction("instruction", "input", "output"),
        has_images=False,
        wanted='{"instruction", "input", "output"}',
    ),
    "baize": Source(
        read=read_raw_records, convert=_baize, has_images=False, wanted='{"input": "... [|Human|] ... [|AI|] ..."}'
    ),
}
