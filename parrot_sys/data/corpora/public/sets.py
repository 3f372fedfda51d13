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

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.record_files import read_raw_records
from parrot_sys.errors import DataError

SourceName = Literal["llava", "aokvqa", "minigpt4", "coco_caption", "ocr_vqa", "vqa_v2", "dolly", "alpaca", "baize"]
Row = Mapping[str, Any]

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A row as an instruction, before its image is looked for."""

    turns: Sequence[Mapping[str, str]]
    images: Sequence[str] = ()
    """Names that the image may have below the directory of images, likeliest first; none: no image."""
    record_id: str


Convert = Callable[[Row, random.Random], Example]
"""(row, generator of this row) -> example; raises DataError, KeyError or TypeError for a row of another form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One public set."""

    read: Callable[..., Iterator[Any]]
    """File -> rows. VQAv2's takes the questions' file as well."""
    convert: Convert
    has_images: bool
    wanted: str
    """Form of a row, for messages."""


def _load(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no valid JSON: {error}") from None


def _rows_below(path: Path, key: str) -> list[Any]:
    """The list below `key` of a JSON object."""
    values = _load(path)
    if not isinstance(values, Mapping) or not isinstance(values.get(key), list):
        raise DataError(f"{path} must hold a JSON object with a list {key!r}, got {_kind(values)}")
    return list(values[key])


def _lack(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _kind(values: Any) -> str:
    return f"an object with {sorted(values)[:5]}" if isinstance(values, Mapping) else type(values).__name__


def _human(text: str, *, image: bool = False, about: str = "") -> dict[str, str]:
    turn = {"from": "human", "value": f"{IMAGE_TOKEN}\n{text}" if image else text}
    return turn | ({"input": about} if about else {})


def _answer(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def _text(row: Row, name: str, *, empty: bool = False) -> str:
    """A string field, stripped.

    Raises:
        DataError: no string there, or (unless `empty`) nothing in it.
    """
    value = row[name]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise DataError(f"`{name}` must be a text{'' if empty else ' that is not empty'}, got {value!r}")
    return value.strip()


def _texts(row: Row, name: str) -> list[str]:
    """A field with one or more strings, stripped.

    Raises:
        DataError: no list of strings there, or an empty one or one with nothing in it.
    """
    values = row[name]
    if not isinstance(values, list) or not values:
        raise DataError(f"`{name}` must be a list of texts, got {values!r}")
    return [_text({name: value}, name) for value in values]


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
    choices, right = _texts(row, "choices"), row["correct_choice_idx"]
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise DataError(f"`correct_choice_idx` must be in [0, {len(choices)}), got {right!r}")
    question = f"{_text(row, 'question')} {generator.choice(WHY)}"
    reasons = " ".join(_texts(row, "rationales"))
    answer = f"The answer is {choices[right]}. Because {reasons}"
    options = ", ".join(choices) if generator.random() < 0.5 else ""
    return Example(
        turns=[_human(question, image=True, about=options), _answer(answer)],
        images=_coco_names(int(row["image_id"])),
        record_id=str(row["question_id"]),
    )


def _minigpt4(row: Row, generator: random.Random) -> Example:
    name = str(row["image_id"])
    turns = [_human(generator.choice(DETAIL_PROMPTS), image=True), _answer(_text(row, "caption"))]
    return Example(turns=turns, images=[f"{name}.jpg", f"image/{name}.jpg"], record_id=name)


def _read_coco_caption(path: Path) -> Iterator[Any]:
    values = _load(path)
    if isinstance(values, list):  # LAVIS: a caption a row
        yield from values
        return
    for index, image in enumerate(_rows_below(path, "images")):
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
            yield DataError(f"image {index} of the file is none of Karpathy's: {_lack(error)}")
            continue
        yield from captions


def _coco_caption(row: Row, generator: random.Random) -> Example:
    image = _text(row, "image")
    turns = [_human(generator.choice(CAPTION_PROMPTS), image=True), _answer(_text(row, "caption"))]
    return Example(turns=turns, images=[image, Path(image).name], record_id=str(row["image_id"]))


def _read_ocr_vqa(path: Path) -> Iterator[Any]:
    books = _load(path)
    if not isinstance(books, Mapping):
        raise DataError(f"{path} must hold a JSON object of books, got {type(books).__name__}")
    for name, book in books.items():
        if not isinstance(book, Mapping) or "split" not in book:
            yield DataError(f"book {name} must be an object with a split, got {_kind(book)}")
        elif book["split"] == 1:  # 2 validation, 3 test
            yield {"book": name, **book}


def _ocr_vqa(row: Row, generator: random.Random) -> Example:
    questions, answers = _texts(row, "questions"), _texts(row, "answers")
    if len(questions) != len(answers):
        raise DataError(f"must have as many answers as questions, got {len(questions)} and {len(answers)}")
    question, answer = generator.choice(list(zip(questions, answers, strict=True)))
    name = f"{row['book']}{Path(row['imageURL']).suffix}"
    turns = [_human(question, image=True), _answer(answer)]
    return Example(turns=turns, images=[name, f"images/{name}"], record_id=str(row["book"]))


def _read_vqa_v2(path: Path, questions: Path) -> Iterator[Any]:
    texts = {row["question_id"]: row["question"] for row in _rows_below(questions, "questions")}
    for row in _rows_below(path, "annotations"):
        yield {**row, "question": texts.get(row.get("question_id"))}


def _vqa_v2(row: Row, _: random.Random) -> Example:
    turns = [_human(_text(row, "question"), image=True), _answer(_text(row, "multiple_choice_answer"))]
    return Example(turns=turns, images=_coco_names(int(row["image_id"])), record_id=str(row["question_id"]))


def _instruction(instruction: str, about: str, answer: str) -> Callable[[Row, random.Random], Example]:
    """Rows with an instruction, what it is about (may be empty) and an answer, in fields of these names."""

    def convert(row: Row, generator: random.Random) -> Example:
        question = _human(_text(row, instruction), about=_text(row, about, empty=True))
        return Example(turns=[question, _answer(_text(row, answer))], record_id="")

    return convert


_BAIZE_SPEAKERS = re.compile(r"\[\|(Human|AI)\|\]")


def _baize(row: Row, _: random.Random) -> Example:
    rest = _BAIZE_SPEAKERS.split(row["input"])[1:]  # before the first speaker is the text that all rows begin with
    said = [(speaker, text.strip()) for speaker, text in zip(rest[::2], rest[1::2], strict=True)]
    if said and said[-1][0] == "Human":  # every row ends with a question that nobody answers, mostly an empty one
        said.pop()
    if any(not text for _, text in said):
        raise DataError("a turn before the last has no text")
    turns = [_human(text) if speaker == "Human" else _answer(text) for speaker, text in said]
    return Example(turns=turns, record_id="")


SOURCES: Mapping[str, Source] = {
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
        read=lambda path: iter(_rows_below(path, "annotations")),
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


def examples(source: Source, rows: Iterable[Any], name: str, seed: int) -> Iterator[tuple[int, Example | DataError]]:
    """(place in the file, example or what is wrong with the row). What is drawn depends on seed, set and place only."""
    for index, row in enumerate(rows):
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, Mapping):
                raise DataError(f"must be a JSON object, got {type(row).__name__}")
            yield index, source.convert(row, random.Random(f"{seed}:{name}:{index}"))
        except DataError as error:
            yield index, error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            yield index, DataError(f"must look like {source.wanted}; {_lack(error)}")
