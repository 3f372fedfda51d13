"""Conversation formats: from turns to text, turn by turn, and where the image marker goes.

* `chatml`: Parrot and Wings. Sources: AIDC-AI/Parrot, parrot/model/conversation_formatter.py (format) and
  parrot/train/data.py (place of the marker).
* `llama3`: Llama 3 Instruct's own format, with the same place of the marker (Wings on Llama-3.1).
* `instruction`: MultiModal-GPT. Source: open-mmlab/Multimodal-GPT, mmgpt/datasets (arXiv 2305.04790, section 3.1).
  Every question is with its own answer; in the public code's dialogues it does not (turn i goes with turn i + 1).
* `vicuna`: LLaVA-1.5 and LLaVA-NeXT on Vicuna. Source: haotian-liu/LLaVA, llava/conversation.py (`vicuna_v1`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from parrot_sys.data.constants import DEFAULT_SYSTEM_PROMPT, IM_END, IM_START, PAD_TOKEN
from parrot_sys.data.parts import (
    IMAGE,
    ImagePosition,
    Part,
    Parts,
    Turn,
    join,
    strip_parts,
    template,
    turn_parts,
)
from parrot_sys.errors import DataError

ROLE_NAMES: Mapping[str, str] = {"system": "system", "human": "user", "gpt": "assistant"}
"""`from` of a turn in a record -> role in ChatML."""
ANSWER_HEADER = f"{IM_START}assistant\n"
INSTRUCTION_HEADER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
"""First line of a conversation in the instruction format; a system turn replaces it."""
RESPONSE_HEADER = "### Response:\n"

VICUNA_HEADER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Opens a conversation in Vicuna's format; a system turn replaces it."""
VICUNA_ANSWER = " ASSISTANT:"

LLAMA3_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"
LLAMA3_END = "<|eot_id|>"

_OPENINGS: Mapping[str, Parts] = {name: (template(f"{IM_START}{role}\n"),) for name, role in ROLE_NAMES.items()}
_DEFAULT_SYSTEM: tuple[str, Parts] = ("system", (Part(DEFAULT_SYSTEM_PROMPT, "text"),))
_CLOSING, _LAST_CLOSING = template(f"{IM_END}\n"), template(IM_END)

TemplateName = Literal["chatml", "llama3", "instruction", "vicuna"]


class Segment(NamedTuple):  # (made for every turn of every record: quicker than a frozen dataclass)
    """A stretch of a conversation that is tokenised on its own."""

    parts: Parts
    bears_loss: bool
    """True where it contains an answer."""
    prefix: Parts = ()
    """First parts of a segment that bears loss: as many ids as they have on their own bear none."""
    begins: bool = False
    """The tokenizer's begin-of-sequence token, if it has one, comes before the text."""
    ends: bool = False
    """The tokenizer's end-of-sequence token comes after the text and bears its loss."""

    @property
    def text(self) -> str:
        """The text that a reader sees; texts of segments, joined, are the prompt."""
        return join(self.parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """One format of conversations."""

    name: TemplateName
    version: str
    """Changes whenever the text of a conversation changes: caches of token counts depend on it."""
    render: Callable[..., list[Segment]]
    """(turns, *, add_generation_prompt=False, image_position="front") -> the segments."""
    special_tokens: tuple[str, ...] = ()
    """Tokens that the tokenizer must know."""
    end_token: str | None = None
    """Ends an answer; None: the tokenizer's own end-of-sequence token."""
    pad_token: str | None = None
    """Padding; None: the tokenizer's own, or the end-of-sequence token where it has none."""
    answer_header: str = ""
    """Text that opens an answer and is tokenised on its own."""


def render_conversation(
    turns: Sequence[Turn], *, add_generation_prompt: bool = False, image_position: ImagePosition = "front"
) -> list[Segment]:
    """The segments of a conversation in ChatML.

    Args:
        turns: a system turn is put first when there is none.
        add_generation_prompt: open an answer at the end and leave it open.
        image_position: where the images of a turn are put, see `place_images`.

    Raises:
        DataError: no turns, or an unknown `from`.
    """
    messages = _messages(turns, image_position)
    closings = [_CLOSING] * len(messages)
    if not add_generation_prompt:
        closings[-1] = _LAST_CLOSING
    segments = []
    for (name, message), closing in zip(messages, closings, strict=True):
        opened = _OPENINGS[name]
        parts = (*opened, *message, closing)
        segments.append(Segment(parts, True, opened) if name == "gpt" else Segment(parts, False))
    if add_generation_prompt:
        segments.append(Segment(_OPENINGS["gpt"], True, _OPENINGS["gpt"]))
    return segments


def render_llama3(
    turns: Sequence[Turn], *, add_generation_prompt: bool = False, image_position: ImagePosition = "front"
) -> list[Segment]:
    """The segments of a conversation in the format of Llama 3 Instruct; arguments and errors as `render_conversation`.

    The model's own template strips every message, and so does this.
    """
    segments = []
    for index, (name, message) in enumerate(_messages(turns, image_position)):
        header = (template(LLAMA3_HEADER.format(role=ROLE_NAMES[name])),)
        segments.append(
            Segment(
                (*header, *strip_parts(message), template(LLAMA3_END)),
                bears_loss=name == "gpt",
                prefix=header if name == "gpt" else (),
                begins=index == 0,
            )
        )
    if add_generation_prompt:
        header = (template(LLAMA3_HEADER.format(role=ROLE_NAMES["gpt"])),)
        segments.append(Segment(header, bears_loss=True, prefix=header))
    return segments


def render_instruction(
    turns: Sequence[Turn], *, add_generation_prompt: bool = False, image_position: ImagePosition = "front"
) -> list[Segment]:
    """The segments of a conversation in the instruction format of MultiModal-GPT, a question with its answer each.

    The header comes once; an image comes before the question it comes with. Loss is on answers and their ends.

    Args:
        turns: after at most one system turn (it replaces the header), human and gpt turns alternate.
        add_generation_prompt: open an answer at the end and leave it open.
        image_position: `in_place` leaves images that follow a word in the instruction.

    Raises:
        DataError: no turns, an unknown `from`, or turns that do not alternate.
    """
    header, rest = _alternating(turns, INSTRUCTION_HEADER, image_position, add_generation_prompt)
    segments = []
    for start in range(0, len(rest), 2):
        answer = turn_parts(rest[start + 1], image_position) if start + 1 < len(rest) else None
        prompt = (*(header if start == 0 else ()), *_question(rest[start], image_position))
        opened = (*prompt, template(f"\n\n{RESPONSE_HEADER}"))
        begins = start == 0
        if answer is not None:
            segments.append(Segment((*opened, *answer), bears_loss=True, prefix=opened, begins=begins, ends=True))
        else:
            segments.append(Segment(opened if add_generation_prompt else prompt, bears_loss=False, begins=begins))
    return segments


def render_vicuna(
    turns: Sequence[Turn], *, add_generation_prompt: bool = False, image_position: ImagePosition = "front"
) -> list[Segment]:
    """The segments of a conversation in Vicuna's format, a question with its answer each.

    Loss is on answers and their ends; arguments and errors as `render_instruction`.
    """
    header, rest = _alternating(turns, VICUNA_HEADER, image_position, add_generation_prompt)
    segments = []
    for start in range(0, len(rest), 2):
        question = (template("USER: "), *strip_parts(turn_parts(rest[start], image_position)))
        prompt = (*header, template(" "), *question) if start == 0 else question
        opened = (*prompt, template(VICUNA_ANSWER))
        if start + 1 < len(rest):
            answer = (template(" "), *strip_parts(turn_parts(rest[start + 1], image_position)))
            segments.append(Segment((*opened, *answer), bears_loss=True, prefix=opened, begins=start == 0, ends=True))
        else:
            segments.append(Segment(opened if add_generation_prompt else prompt, bears_loss=False, begins=start == 0))
    return segments


CHATML = Template(
    name="chatml",
    version="parrot-chatml-1",
    render=render_conversation,
    special_tokens=(IM_START, IM_END, PAD_TOKEN),
    end_token=IM_END,
    pad_token=PAD_TOKEN,
    answer_header=ANSWER_HEADER,
)
LLAMA3 = Template(
    name="llama3",
    version="llama3-1",
    render=render_llama3,
    special_tokens=("<|start_header_id|>", "<|end_header_id|>", LLAMA3_END),
    end_token=LLAMA3_END,
    answer_header=LLAMA3_HEADER.format(role=ROLE_NAMES["gpt"]),
)
INSTRUCTION = Template(name="instruction", version="instruction-1", render=render_instruction)
VICUNA = Template(name="vicuna", version="vicuna-1", render=render_vicuna)
TEMPLATES: Mapping[str, Template] = {template.name: template for template in (CHATML, LLAMA3, INSTRUCTION, VICUNA)}


def _question(turn: Turn, position: ImagePosition) -> Parts:
    asked = turn_parts({key: value for key, value in turn.items() if key != "input"}, position)
    parts: list[Part] = []
    while asked and asked[0].kind == "image":  # each in front has a section of its own, and its newline with it
        parts += [template("\n\n### Image:\n"), IMAGE]
        asked = asked[2:]
    parts += [template("\n\n### Instruction:\n"), *asked]
    if turn.get("input"):
        parts += [template("\n\n### Input:\n"), Part(turn["input"], "text")]
    return tuple(parts)


def _alternating(
    turns: Sequence[Turn], usual_header: str, position: ImagePosition, add_generation_prompt: bool
) -> tuple[Parts, list[Turn]]:
    """Opening of a conversation, and its human and gpt turns in turn."""
    _check_turns(turns)
    header: Parts = (template(usual_header),)
    rest = list(turns)
    if rest[0]["from"] == "system":
        header = turn_parts(rest.pop(0), position)
    wanted = ["human" if index % 2 == 0 else "gpt" for index in range(len(rest))]
    roles = [turn["from"] for turn in rest]
    if roles != wanted or not rest:
        raise DataError(f"turns must be human and gpt in turn, beginning with human, got {', '.join(roles) or 'none'}")
    if add_generation_prompt and len(rest) % 2 == 0:
        raise DataError("the last turn must be a human one before an answer is opened, got a gpt turn")
    return header, rest


def _messages(turns: Sequence[Turn], position: ImagePosition) -> list[tuple[str, Parts]]:
    """(`from`, what it says) of every turn, a system turn first."""
    _check_turns(turns)
    messages = [(turn["from"], turn_parts(turn, position)) for turn in turns]
    if messages[0][0] == "system":
        return messages
    return [_DEFAULT_SYSTEM, *messages]


def _check_turns(turns: Sequence[Turn]) -> None:
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str | list) or "from" not in turn:
            raise DataError(f'turn {index} must be {{"from": ..., "value": text}}, got {turn!r}')
    if not turns:
        raise DataError("a conversation must have at least one turn, got none")
    if unknown := next((turn["from"] for turn in turns if turn["from"] not in ROLE_NAMES), None):
        raise DataError(f"`from` of a turn must be one of {', '.join(ROLE_NAMES)}, got {unknown!r}")
