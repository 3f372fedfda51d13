"""Processor of transformers over `ParrotProcessor`: messages or texts with pictures in, tensors out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

from parrot_sys.data.chat_templates import chat_template
from parrot_sys.data.constants import IMAGE_TOKEN, IMAGE_TOKEN_ID
from parrot_sys.data.decoding import image_size
from parrot_sys.data.messages import images_of, turns_of
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.integrations.hugging_face.refusals import besides_hub, refuse


class ReleasedProcessor(ProcessorMixin):
    """Tokenizer, conversation format and picture preprocessing of an exported checkpoint.

    `input_ids` hold -200 once for each picture; the model makes its rows.
    """

    def __init__(self, processor: ParrotProcessor) -> None:
        """
        Args:
            processor: does the work.
        """
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.chat_template = chat_template(processor.template, processor.image_position)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Parts that transformers looks for."""
        return ["tokenizer"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> ReleasedProcessor:
        """The processor of an exported directory.

        Raises:
            CheckpointError: there is none in the directory.
            ConfigError: another argument than those of a hub is given.
        """
        # (a pipeline hands the model's arguments on)
        refuse(besides_hub(kwargs, "dtype", "torch_dtype", "device_map"))
        return cls(ParrotProcessor.from_pretrained(pretrained_model_name_or_path))

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the tokenizer's files and preprocessor_config.json."""
        refuse({"push_to_hub": push_to_hub, **kwargs})
        self.processor.save_pretrained(save_directory)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Ids of texts that are prompts already, such as those that `apply_chat_template` writes.

        Args:
            images: pictures in the order of the texts' `<image>`: one, a list, or a list for each text.
            text: one or several; names of control tokens in them are control tokens.
            padding: on the left, where texts differ in length.
            return_tensors: "pt", or None for lists of ids.

        Raises:
            DataError: pictures and markers do not fit together, or texts differ in length without padding.
            ConfigError: another argument is given.
        """
        refuse({name: value for name, value in kwargs.items() if name != "add_special_tokens"})
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts:
            raise DataError("text must be a text or a list of texts, got none")
        pictures = _flat(images)
        if (wanted := sum(one.count(IMAGE_TOKEN) for one in texts)) != len(pictures):
            raise DataError(f"images must be as many as the {wanted} {IMAGE_TOKEN} in text, got {len(pictures)}")
        return self._batch([self._ids(one) for one in texts], pictures, bool(padding), return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Text of one or several conversations, or with `tokenize` ids and pictures.

        Ids are those of training: no text of a message becomes a control token or a picture.

        Args:
            conversation: messages with `role` and `content`, or a list of conversations.
            chat_template: None; the checkpoint's own format is what it was trained on.
            add_generation_prompt: end with an opened answer.
            continue_final_message: not supported.
            tokenize: give ids, not text.
            return_dict: with `tokenize` all inputs of the model, not the ids alone.
            return_tensors: "pt", or None for lists of ids.
            processor_kwargs: `padding`, and what else may be given here.

        Raises:
            DataError: a message is none.
            ConfigError: another argument is given.
        """
        options = {**kwargs, **(processor_kwargs or {})}
        padding = bool(options.pop("padding", False))
        return_tensors = options.pop("return_tensors", return_tensors)
        refuse({"chat_template": chat_template, "continue_final_message": continue_final_message, **options})
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = list(conversation) if several else [conversation]
        formatted = [
            self.processor.format_conversation(turns_of(messages), add_generation_prompt=add_generation_prompt)
            for messages in conversations
        ]
        if not tokenize:
            prompts = [each["prompt"] for each in formatted]
            return prompts if several else prompts[0]
        pictures = [image for messages in conversations for image in images_of(messages)]
        batch = self._batch([each["input_ids"] for each in formatted], pictures, padding, return_tensors)
        return batch if return_dict else batch["input_ids"]

    def picture_inputs(self, images: Sequence[Any], return_tensors: str | None = None) -> dict[str, Any]:
        """`pixel_values`, and `image_sizes` where pictures are cut into tiles; nothing for no pictures.

        Args:
            images: files, addresses or pictures.
            return_tensors: "pt", or None for sizes as lists.
        """
        if not images:
            return {}
        loaded = [_file_or_image(picture) for picture in images]
        data: dict[str, Any] = {
            "pixel_values": torch.cat([each.pixel_values for each in self.processor.pictures(loaded)])
        }
        if self.processor.tiling is not None:  # tells how many rows each picture takes
            exif = self.processor.image_processor.exif
            sizes = [list(image_size(picture, exif=exif)) for picture in loaded]
            data["image_sizes"] = torch.tensor(sizes) if return_tensors else sizes
        return data

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Texts of several rows of ids."""
        return [self.decode(row, *args, **kwargs) for row in sequences]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """Text of ids; a picture is `<image>`, or nothing where special tokens are skipped."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        runs: list[list[int]] = [[]]
        for token in ids:
            if token == IMAGE_TOKEN_ID:
                runs.append([])
            else:
                runs[-1].append(token)
        texts = [self.tokenizer.decode(run, skip_special_tokens=skip_special_tokens, **kwargs) for run in runs]
        return ("" if skip_special_tokens else IMAGE_TOKEN).join(texts)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Texts of generated rows."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a batch holds."""
        sizes = [] if self.processor.tiling is None else ["image_sizes"]
        return ["input_ids", "attention_mask", "pixel_values", *sizes]

    def _ids(self, text: str) -> list[int]:
        first, *rest = [self.tokenizer.encode(run, add_special_tokens=False) for run in text.split(IMAGE_TOKEN)]
        return [*first, *(token for run in rest for token in (IMAGE_TOKEN_ID, *run))]

    def _batch(
        self, rows: Sequence[Sequence[int]], pictures: Sequence[Any], padding: bool, return_tensors: str | None
    ) -> BatchFeature:
        if return_tensors not in (None, "pt"):
            raise ConfigError(f'return_tensors must be "pt" or None, got {return_tensors!r}')
        width = max(map(len, rows))
        if return_tensors and not padding and any(len(row) != width for row in rows):
            raise DataError("texts of several lengths need padding=True to be one tensor")
        pad = self.tokenizer.pad_token_id
        gaps = [width - len(row) if padding else 0 for row in rows]
        data: dict[str, Any] = {
            "input_ids": [[pad] * gap + list(row) for gap, row in zip(gaps, rows, strict=True)],
            "attention_mask": [[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)],
        }
        data |= self.picture_inputs(pictures)
        return BatchFeature(data, tensor_type=return_tensors)


def _file_or_image(picture: Any) -> Any:
    """A picture that `ParrotProcessor` decodes by its own rules; transformers fetches addresses and base64."""
    return load_image(picture) if isinstance(picture, str) and not os.path.isfile(picture) else picture


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [picture for each in images for picture in _flat(each)]
    return [images]
