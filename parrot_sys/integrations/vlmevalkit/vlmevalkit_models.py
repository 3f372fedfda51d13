"""Models of VLMEvalKit: a checkpoint in this process, and a server. Prompts and answers are those of `parrot eval`."""

from __future__ import annotations

import base64
import json
import mimetypes
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas
import torch
from vlmeval.api.lmdeploy import LMDeployAPI
from vlmeval.dataset import DATASET_TYPE
from vlmeval.vlm.base import BaseModel

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.languages import split_suffix
from parrot_sys.errors import ConfigError
from parrot_sys.evaluation.prompts import clean_answer, question_prompt
from parrot_sys.evaluation.tsv import Question, picture_bytes
from parrot_sys.inference.generation import generate_texts
from parrot_sys.inference.pretrained import load_pretrained
from parrot_sys.inference.requests import free_rows
from parrot_sys.integrations.task_requests import question_sample, task_request

Message = list[dict[str, str]]
"""Parts of a question: `type` (text or image) and `value`, of an image its file."""


class Prompts:
    """Questions with options as `parrot eval` asks them; other data sets keep the kit's own prompts."""

    dump_image_func: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pictures = TemporaryDirectory(prefix="parrot_pictures_")

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether a data set has options."""
        return dataset is not None and DATASET_TYPE(dataset) == "MCQ"

    def build_prompt(self, line: Mapping[str, Any], dataset: str | None = None) -> Message:
        """Picture, then hint, question, options and the instruction in the language of the table."""
        images = self._images(line)
        question = _question(dict(line.items()), has_picture=bool(images))
        text = question_prompt(question, _language(dataset or "")).removeprefix(f"{IMAGE_TOKEN}\n")
        return [*({"type": "image", "value": path} for path in images), {"type": "text", "value": text}]

    def _images(self, line: Mapping[str, Any]) -> list[str]:
        """Files of a question's pictures, as the table holds them: the kit's own would be JPEG once more."""
        cell = line.get("image")
        if not isinstance(cell, str):
            found = self.dump_image_func(line) if any(name in line for name in ("image", "image_path")) else []
            return [found] if isinstance(found, str) else list(found)
        path = Path(self._pictures.name, f"{line['index']}{_suffix(content := picture_bytes(cell))}")
        path.write_bytes(content)
        return [str(path)]


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
        sample = question_sample(self.processor, text, pictures)
        request = task_request(
            sample,
            {},
            max_new_tokens=min(self.max_new_tokens, max(1, free_rows(self.model.config, sample))),
            stop_ids=self.model.eos_token_ids,
        )
        (answer,) = generate_texts(self.model.lockstep, [request], self.processor.tokenizer)
        return clean_answer(answer.strip(), text)


class ParrotServer(Prompts, LMDeployAPI):
    """A model behind `parrot serve`, asked through the kit's class for servers of OpenAI's interface."""

    def __init__(self, server: str, *, max_new_tokens: int) -> None:
        """
        Args:
            server: its address, with or without `/v1`.
            max_new_tokens: longest answer.

        Raises:
            ConfigError: it serves no model.
        """
        base = server.rstrip("/").removesuffix("/v1") + "/v1"
        with urllib.request.urlopen(f"{base}/models", timeout=30) as answer:
            models = json.load(answer).get("data") or []
        if not models:
            raise ConfigError(f"--server {server}: {base}/models names no model")
        super().__init__(
            model=models[0]["id"], api_base=f"{base}/chat/completions", max_tokens=max_new_tokens, verbose=False
        )

    def prepare_itlist(self, inputs: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
        """Pictures as they are, then the text."""
        pictures, text = _parts(inputs)
        urls = [{"url": _data_url(picture)} for picture in pictures]
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": url} for url in urls]
        return [*parts, {"type": "text", "text": text}]

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """The answer to a question."""
        answer = str(super().generate(message, dataset=dataset))
        text = _parts(message)[1] if isinstance(message, list) else str(message)
        return clean_answer(answer.strip(), text)


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


def _language(dataset: str) -> str:
    """Language of a data set by the end of its name, as in `MMMB_tr`."""
    return split_suffix(dataset.lower())[1] or "en"


def _suffix(content: bytes) -> str:
    """End of the name of a picture's file, by its first bytes."""
    known = {b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}
    return next((suffix for start, suffix in known.items() if content.startswith(start)), ".jpg")


def _data_url(path: str) -> str:
    kind = mimetypes.guess_type(path)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
