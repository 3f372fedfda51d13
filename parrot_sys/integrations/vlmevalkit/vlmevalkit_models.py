"""Models of VLMEvalKit: a checkpoint in this process, and a server. Prompts and answers are those of `parrot eval`."""

from __future__ import annotations

import base64
import hashlib
import http.client
import logging
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas
import torch
from vlmeval.api.lmdeploy import LMDeployAPI
from vlmeval.dataset import DATASET_MODALITY, DATASET_TYPE, SUPPORTED_DATASETS, build_dataset
from vlmeval.vlm.base import BaseModel

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.languages import split_suffix
from parrot_sys.errors import DataError
from parrot_sys.evaluation.prompts import clean_answer, question_prompt
from parrot_sys.evaluation.tsv import Question, picture_bytes
from parrot_sys.inference.generation import generate_texts
from parrot_sys.inference.pretrained import load_pretrained
from parrot_sys.inference.requests import free_rows
from parrot_sys.integrations.task_requests import question_sample, task_request
from parrot_sys.integrations.vlmevalkit.server_client import ask, base_url, reason_of, served_model

logger = logging.getLogger(__name__)

Message = list[dict[str, str]]
"""Parts of a question: `type` (text or image) and `value`, of an image its file."""
NO_ANSWER = "Failed to obtain answer via API."
"""Answer that says to the kit that there is none: it counts such ones, and asks them anew with --reuse."""
SECONDS = 1800
"""Longest wait for an answer of a server, as run.py has it for the kit's own classes."""
_BLANK = " "
"""An empty answer, which the kit would ask for again and then count as none."""
_OF_THE_KIT = frozenset(SUPPORTED_DATASETS)
_LANGUAGES = frozenset(("ar", "en", "es", "fr", "ja", "ko", "pt", "ru", "tr", "zh"))
"""Languages that data sets of the kit's own are in. What else their names end in is no language: `MMT-Bench_VAL_MI` has
several pictures (multi-image) and is not in Maori."""
_TRY_LATER = (408, 429)


class Prompts:
    """Questions with options as `parrot eval` asks them; other data sets keep the kit's own prompts."""

    allowed_types = ("text", "image")
    dump_image_func: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pictures = TemporaryDirectory(prefix="parrot_pictures_")
        self._tables: dict[str, dict[Any, Any]] = {}

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether a data set has options, and no videos."""
        return dataset is not None and DATASET_TYPE(dataset) == "MCQ" and DATASET_MODALITY(dataset) != "VIDEO"

    def build_prompt(self, line: Mapping[str, Any], dataset: str | None = None) -> Message:
        """Picture, then hint, question, options and the instruction in the language of the table."""
        images = self._images(line)
        question = _question(dict(line.items()), has_picture=bool(images))
        language = table_language(_table_name(line) or dataset or "")
        text = question_prompt(question, language).removeprefix(f"{IMAGE_TOKEN}\n")
        return [*({"type": "image", "value": path} for path in images), {"type": "text", "value": text}]

    def _images(self, line: Mapping[str, Any]) -> list[str]:
        """Files of a question's pictures, as the table holds them: the kit's own would be JPEG once more."""
        cell = self._cell(line)
        if not isinstance(cell, str):
            found = self.dump_image_func(line) if any(name in line for name in ("image", "image_path")) else []
            return [found] if isinstance(found, str) else list(found)
        content = picture_bytes(cell)
        path = Path(self._pictures.name, hashlib.sha256(content).hexdigest() + _suffix(content))
        path.write_bytes(content)
        return [str(path)]

    def _cell(self, line: Mapping[str, Any]) -> Any:
        """Cell of a question's picture in its table. A data set that joins tables has only files of its own making
        in its place, so that the question's table is read once more."""
        name = _table_name(line)
        if name is None or "image" in line:
            return line.get("image")
        if name not in self._tables:
            data = build_dataset(name).data
            self._tables = {name: dict(zip(data["index"], data["image"], strict=True)) if "image" in data else {}}
        return self._tables[name].get(line["original_index"])


class ParrotVLM(Prompts, BaseModel):
    """A checkpoint in this process."""

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(self, checkpoint: str, *, max_new_tokens: int, device: str | None = None) -> None:
        """
        Args:
            checkpoint: exported directory or training run.
            max_new_tokens: longest answer.
            device: None takes a GPU if there is one.
        """
        super().__init__()
        self.model, self.processor = load_pretrained(checkpoint, device=device)
        self.max_new_tokens = max_new_tokens

    @torch.no_grad()
    def generate_inner(self, message: Message, dataset: str | None = None) -> str:
        """The answer to a question."""
        pictures, text = _parts(message)
        try:
            sample = question_sample(self.processor, text, pictures)
            request = task_request(
                sample,
                {},
                max_new_tokens=min(self.max_new_tokens, max(1, free_rows(self.model.config, sample))),
                stop_ids=self.model.eos_token_ids,
            )
            (answer,) = generate_texts(self.model.lockstep, [request], self.processor.tokenizer)
        except DataError as error:
            return _unanswered(dataset, error)
        return clean_answer(answer.strip(), text)


class ParrotServer(Prompts, LMDeployAPI):
    """A model behind `parrot serve`, asked through the kit's class for servers of OpenAI's interface."""

    key: str

    def __init__(
        self, server: str, *, max_new_tokens: int, key: str = "", retry: int = 5, verbose: bool = False
    ) -> None:
        """
        Args:
            server: its address, with or without `/v1`.
            max_new_tokens: longest answer; a prompt that leaves less room has a shorter one.
            key: sent with each request; empty takes that of LMDEPLOY_API_KEY, the kit's own variable, if it is set.
            retry: how often a question is asked while the server fails or is busy.
            verbose: print each answer.

        Raises:
            ConfigError: the server does not answer, wants another key, or serves no model.
        """
        url = f"{base_url(server)}/chat/completions"
        super().__init__(
            model="",
            api_base=url,
            key="",
            max_tokens=max_new_tokens,
            retry=retry,
            verbose=verbose,
            timeout=SECONDS,
        )
        self.key = key or self.key
        self.model = served_model(server, self.key)
        self.fail_msg = f"{NO_ANSWER} "  # the kit asks again for what holds this, and not for NO_ANSWER alone

    def prepare_itlist(self, inputs: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
        """Pictures as they are, then the text."""
        pictures, text = _parts(inputs)
        urls = [{"url": _data_url(picture)} for picture in pictures]
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": url} for url in urls]
        return [*parts, {"type": "text", "text": text}]

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """The answer to a question."""
        answer = str(super().generate(message, dataset=dataset)).strip()
        text = _parts(message)[1] if isinstance(message, list) else str(message)
        return answer if answer == NO_ANSWER else clean_answer(answer, text)

    def generate_inner(self, inputs: Any, dataset: str | None = None, **settings: Any) -> tuple[int, str, str]:
        """Status (0: this is the answer, others: the kit may ask again), answer, and what the server says.

        A prompt that leaves less room than `max_tokens` is refused by servers; without the number they give it the
        room that there is.
        """
        body = {"model": self.model, "messages": self.prepare_inputs(inputs, self.system_prompt), **settings}
        try:
            status, content = self._ask(body)
            if status == 400 and body.pop("max_tokens", None) is not None:
                status, content = self._ask(body)
        except (OSError, http.client.HTTPException) as error:
            logger.warning("%s: no answer (%s)", self.api_base, getattr(error, "reason", None) or error)
            return 503, self.fail_msg, str(error)
        if status == 200:
            answer = content["choices"][0]["message"]["content"] or ""
            return 0, answer.strip() or _BLANK, answer
        reason = reason_of(content)
        if 400 <= status < 500 and status not in _TRY_LATER:
            return 0, _unanswered(dataset, f"{status} ({reason})"), reason
        logger.warning("%s: %s (%s)", self.api_base, status, reason)
        return status, self.fail_msg, reason

    def _ask(self, body: Mapping[str, Any]) -> tuple[int, Any]:
        return ask(self.api_base, self.key, body, timeout=self.timeout)


def table_language(name: str) -> str:
    """Language of a table by the end of its name, as in `MMMB_tr`: as `parrot eval` reads it, but of names that the kit
    knows only where it is one."""
    stated = split_suffix(name.lower())[1] or "en"
    return "en" if name in _OF_THE_KIT and stated not in _LANGUAGES else stated


def _table_name(line: Mapping[str, Any]) -> str | None:
    """Of the table that a question comes from, where the data set joins several (`MMMB`)."""
    name = line.get("SUB_DATASET")
    return name if isinstance(name, str) else None


def _unanswered(dataset: str | None, reason: object) -> str:
    """Substitute for the answer to a question that cannot be asked."""
    logger.warning("%s: a question cannot be asked and counts as failed: %s", dataset, reason)
    return NO_ANSWER


def _parts(message: Sequence[Mapping[str, str]]) -> tuple[list[str], str]:
    """Files of the pictures, and the text."""
    pictures = [part["value"] for part in message if part["type"] == "image"]
    return pictures, "\n".join(part["value"] for part in message if part["type"] == "text")


def _question(line: Mapping[str, Any], *, has_picture: bool) -> Question:
    """A row of the kit; its empty cells are no text."""
    letters = sorted(name for name in line if len(name) == 1 and "A" <= name <= "Z")
    held = {letter: str(line[letter]) for letter in letters if not pandas.isna(line[letter])}
    hint = line.get("hint")
    return Question(
        index=0,
        question=str(line["question"]),
        options=held,
        answer="",
        image_key="picture" if has_picture else None,
        group=0,
        hint=None if hint is None or pandas.isna(hint) else str(hint),
    )


def _suffix(content: bytes) -> str:
    """End of the name of a picture's file, by its first bytes."""
    known = {b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}
    return next((suffix for start, suffix in known.items() if content.startswith(start)), ".jpg")


def _data_url(path: str) -> str:
    kind = mimetypes.guess_type(path)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
