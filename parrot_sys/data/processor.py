"""ParrotProcessor: tokenizer, conversation format and image preprocessing of one model."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from parrot_sys.data.chat_templates import chat_template
from parrot_sys.data.config import DataConfig
from parrot_sys.data.control_tokens import TextEncoder
from parrot_sys.data.decoding import ImageInput, ImageLimits, image_size
from parrot_sys.data.images import ImageProcessor
from parrot_sys.data.parts import ControlTokens, ImagePosition, Part, Turn
from parrot_sys.data.picture import Picture
from parrot_sys.data.templates import CHATML, INSTRUCTION, TEMPLATES, Segment, Template, TemplateName
from parrot_sys.data.tokenization import BareTokenizer, ConversationEncoder, encode_conversations
from parrot_sys.data.tokenizer_files import (
    MissingTokenizer,
    check_vocabulary,
    has_tokenizer,
    load_tokenizer,
    template_of_tokenizer,
)
from parrot_sys.errors import CheckpointError, ConfigError
from parrot_sys.files import Fields, naming_file, read_json
from parrot_sys.towers import KNOWN_TOWERS, RESOLUTIONS, PictureRows, Tiling, resolutions_from_hf, vision_config_from_hf

PREPROCESSOR_FILE = "preprocessor_config.json"
_TEMPLATE_KEY = "conversation_template"
_POSITION_KEY = "image_position"
_SIDE_KEY = "tile_side"
_TOWER_FOLDER = "vision_tower"  # exported checkpoints carry the tower's files inside


class ParrotProcessor:
    """Turns conversations into ids and labels, and images into pixel values, exactly as the released code does."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: ImageProcessor,
        template: Template = CHATML,
        *,
        image_position: ImagePosition = "front",
        control_tokens: ControlTokens = "text",
        tiling: Tiling | None = None,
    ) -> None:
        """
        Args:
            tokenizer: from `load_tokenizer`.
            image_processor: of the vision tower.
            template: format of conversations.
            image_position: where the images of a turn are put, see `place_images`.
            control_tokens: what the name of a control token in a text is, see `TextEncoder`.
            tiling: how pictures are cut into tiles; None leaves them whole.
        """
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template = template
        self.image_position: ImagePosition = image_position
        self.control_tokens: ControlTokens = control_tokens
        self.tiling = tiling
        self._encoder: TextEncoder | None = None
        self._encoder_size = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encoder": None}  # (quicker to make than to send)

    @classmethod
    def from_pretrained(cls, path: str | Path, template: TemplateName | None = None) -> ParrotProcessor:
        """Reads a checkpoint in the released Parrot layout, or what `save_pretrained` wrote.

        The tokenizer lies in `path`; preprocessor_config.json in `path`, in the directory that `mm_vision_tower` of
        config.json names relative to `path`, or in `path`/vision_tower. The published models' towers need no file.

        Args:
            path: the directory.
            template: format of conversations; None takes the one that either file names, ChatML where none does.

        Raises:
            CheckpointError: one of them is missing or unreadable.
            ConfigError: the preprocessing is of a kind that is not supported.
        """
        directory = Path(path)
        chosen = _load_template(directory) if template is None else TEMPLATES[template]
        tokenizer: Any = (
            load_tokenizer(directory, chosen) if _needs_tokenizer(directory) else MissingTokenizer(directory)
        )
        images = _load_image_processor(directory)
        return cls(
            tokenizer,
            images,
            chosen,
            image_position=_load_image_position(directory),
            tiling=_load_tiling(directory, images.height),
        )

    @classmethod
    def for_tower(
        cls, tokenizer_path: str | Path, tower: str, image_size: int, template: TemplateName = "chatml"
    ) -> ParrotProcessor:
        """For a model that is no checkpoint yet: `vision.type`, `vision.image_size` and `template` of its settings."""
        chosen = TEMPLATES[template]
        return cls(load_tokenizer(tokenizer_path, chosen), ImageProcessor.for_tower(tower, image_size), chosen)

    def with_text_rules(self, image_position: ImagePosition, control_tokens: ControlTokens) -> ParrotProcessor:
        """This processor with other rules for texts, see the constructor."""
        other = copy.copy(self)
        other.image_position, other.control_tokens, other._encoder = image_position, control_tokens, None
        return other

    def with_tiling(self, tiling: Tiling | None) -> ParrotProcessor:
        """This processor with pictures cut into tiles as `tiling` says, or left whole."""
        other = copy.copy(self)
        other.tiling = tiling
        return other

    def with_image_limits(self, limits: ImageLimits) -> ParrotProcessor:
        """This processor with other limits of the pictures that it reads."""
        other = copy.copy(self)
        other.image_processor = replace(self.image_processor, limits=limits)
        return other

    def with_data_config(self, data: DataConfig) -> ParrotProcessor:
        """This processor with the rules for texts and pictures that training data are read by."""
        other = self.with_text_rules(data.image_position, data.control_tokens)
        other.image_processor = replace(
            self.image_processor, exif=data.exif, transparency=data.transparency, limits=data.image_limits
        )
        return other

    def check_fits(self, vocab_size: int, image_size: int, where: object, *, tiling: Tiling | None = None) -> None:
        """Whether a model with these sizes can take what this processor, read from `where`, makes.

        Raises:
            CheckpointError: the tokenizer has ids beyond the vocabulary, or pictures have another size or other tiles.
        """
        check_vocabulary(self.tokenizer, vocab_size, where)
        size = (self.image_processor.height, self.image_processor.width)
        if size != (image_size, image_size):
            raise CheckpointError(
                f"{where}: {PREPROCESSOR_FILE} makes pictures of {size[0]} x {size[1]} pixels, but the vision tower "
                f"takes {image_size} x {image_size}: use the file of this tower"
            )
        if self.tiling != tiling:
            raise CheckpointError(
                f"{where}: {PREPROCESSOR_FILE} cuts pictures into tiles by {self.tiling}, but the model takes "
                f"{tiling}: use the file of this model"
            )

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the tokenizer's files, with its `chat_template`, and preprocessor_config.json into the directory."""
        Path(path).mkdir(parents=True, exist_ok=True)
        self.tokenizer.chat_template = chat_template(self.template, self.image_position)
        self.tokenizer.save_pretrained(path)
        own: dict[str, str] = {} if self.template is CHATML else {_TEMPLATE_KEY: self.template.name}
        own |= {} if self.image_position == "front" else {_POSITION_KEY: self.image_position}
        text = json.dumps(self.image_settings() | own, indent=2) + "\n"
        (Path(path) / PREPROCESSOR_FILE).write_text(text, encoding="utf-8")

    def format_conversation(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> dict[str, Any]:
        """Text, ids and labels of one conversation in the model's format.

        Args:
            turns: `{"from": "system" | "human" | "gpt", "value": text}`, one `<image>` in a human turn's text for each
                image; a human turn may have `input`, a text that its instruction is about. For a text in which
                `<image>` may be just text, `value` is a list of parts (see `Turn`, `human_turn`).
            add_generation_prompt: end with an opened answer, for generation.

        Returns:
            `prompt` (str), `input_ids` and `labels` (lists of int of the same length, not shifted): -200 stands for an
            image in the ids; labels are -100 except in answers.

        Raises:
            DataError: no turns, an unknown `from`, or a text that has no UTF-8.
        """
        segments = self.render(turns, add_generation_prompt=add_generation_prompt)
        (input_ids, labels) = self.encode([segments])[0]
        prompt = "".join(segment.text for segment in segments)
        return {"prompt": prompt, "input_ids": input_ids.tolist(), "labels": labels.tolist()}

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> list[Segment]:
        """The segments of a conversation, for `encode`; see `format_conversation`."""
        return self.template.render(
            turns, add_generation_prompt=add_generation_prompt, image_position=self.image_position
        )

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text that somebody wrote, for example an option.

        Raises:
            DataError: it has no UTF-8.
        """
        return self._text_encoder().encode([[Part(text, "text")]])[0]

    def encode(
        self, conversations: Sequence[Sequence[Segment]]
    ) -> list[tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]]:
        """(input_ids, labels), int64 [n] each, of rendered conversations; one call for many is faster."""
        return encode_conversations(self.tokenizer, self._text_encoder(), conversations)

    def conversation_encoder(self) -> ConversationEncoder:
        """`render` and `encode` of this processor, for processes that see no pictures."""
        bare = BareTokenizer.of(self.tokenizer)
        return ConversationEncoder(bare, self.template, self.image_position, self.control_tokens)

    def _text_encoder(self) -> TextEncoder:
        """Made when text is first encoded, and again after tokens were added to the tokenizer."""
        if self._encoder is None or self._encoder_size != len(self.tokenizer):
            self._encoder = TextEncoder(self.tokenizer, self.control_tokens)
            self._encoder_size = len(self.tokenizer)
        return self._encoder

    def image_settings(self) -> dict[str, Any]:
        """Everything that decides the pixels of a picture, as preprocessor_config.json has it."""
        settings = self.image_processor.to_dict()
        if self.tiling is None:
            return settings
        return settings | self.tiling.hf_fields() | {_SIDE_KEY: self.tiling.side}

    def pictures(self, images: Iterable[ImageInput]) -> list[Picture]:
        """Preprocessed pictures, for `Sample` and the model; cut into tiles where the model wants them so.

        Args:
            images: Pillow images, file names, or bytes of image files.

        Raises:
            DataError: an image is missing or cannot be read.
        """
        if self.tiling is None:
            return [Picture(torch.from_numpy(self.image_processor(image)).unsqueeze(0)) for image in images]
        pictures = []
        for image in images:
            pixels, size = self.image_processor.tiles(image, self.tiling)
            pictures.append(Picture(torch.from_numpy(pixels), self.tiling.rows(*size)))
        return pictures

    def no_pixels(self) -> Tensor:
        """`pixel_values` of no picture, [0, 3, h, w]."""
        return torch.empty(0, 3, self.image_processor.height, self.image_processor.width)

    def rows_of(self, image: ImageInput, num_visual_rows: int) -> PictureRows:
        """Rows of a picture that `pictures` would give, from its size alone; a whole one has `num_visual_rows`.

        Raises:
            DataError: the picture is to be cut into tiles, and is missing or is none.
        """
        if self.tiling is None:
            return PictureRows.whole(num_visual_rows)
        processor = self.image_processor
        return self.tiling.rows(*image_size(image, exif=processor.exif, limits=processor.limits))

    def images(self, images: Iterable[ImageInput]) -> Tensor:
        """Preprocessed images, float32 [n, 3, h, w]; n may be 0.

        Args:
            images: as for `pictures`.

        Raises:
            ConfigError: pictures are cut into tiles, of which there are several for each.
            DataError: an image is missing or cannot be read.
        """
        if self.tiling is not None:
            raise ConfigError("this model cuts pictures into tiles: use processor.pictures, not processor.images")
        return torch.cat([self.no_pixels(), *(picture.pixel_values for picture in self.pictures(images))])


def _fields(file: Path) -> Fields:
    """Fields of a JSON file of a checkpoint; none when it is missing."""
    return Fields(read_json(file) if file.is_file() else None, file)


def _load_template(directory: Path) -> Template:
    """As preprocessor_config.json (of a training checkpoint) or the own part of config.json says."""
    own, config = _fields(directory / PREPROCESSOR_FILE), _fields(directory / "config.json")
    usual = INSTRUCTION if config.get("model_type", str) == "multimodal_gpt" else CHATML
    name = own.get(_TEMPLATE_KEY, str) or config.below("parrot_sys").get("template", str)
    if name is None:  # (Models of transformers' own layout say it in a program of their chat_template.)
        name = (template_of_tokenizer(directory) if "vision_config" in config else usual).name
    if name not in TEMPLATES:
        raise CheckpointError(
            f"{directory}: the conversation template must be one of {', '.join(TEMPLATES)}, got {name!r}"
        )
    return TEMPLATES[name]


def _load_image_position(directory: Path) -> ImagePosition:
    position = _fields(directory / PREPROCESSOR_FILE).get(_POSITION_KEY, str, "front")
    if position not in get_args(ImagePosition):
        raise CheckpointError(
            f"{directory / PREPROCESSOR_FILE}: {_POSITION_KEY} must be one of {', '.join(get_args(ImagePosition))}, "
            f"got {position!r}"
        )
    return cast(ImagePosition, position)


def _needs_tokenizer(directory: Path) -> bool:
    """A MultiModal-GPT may have been put together without one; for other models that is an error."""
    config = _fields(directory / "config.json")
    return has_tokenizer(directory) or config.get("model_type", str) != "multimodal_gpt"


def _load_tiling(directory: Path, tile: int) -> Tiling | None:
    """As preprocessor_config.json says that `save_pretrained` wrote, or config.json of a released checkpoint."""
    own, config = _fields(directory / PREPROCESSOR_FILE), _fields(directory / "config.json")
    if _SIDE_KEY in own:
        fields, side = own, own.require(_SIDE_KEY, int)
    elif RESOLUTIONS in config and "vision_config" in config:
        vision = vision_config_from_hf(config.values, file=config.file)
        fields, side = config, vision.image_size // vision.patch_size
    else:
        return None
    with naming_file(fields.file):
        return Tiling(resolutions=resolutions_from_hf(fields), tile=tile, side=side)


def _load_image_processor(directory: Path) -> ImageProcessor:
    config = _fields(directory / "config.json")
    # A bare language model says nothing about images: Parrot pads them, in training as in its released checkpoints.
    # (MultiModal-GPT resizes and crops as CLIP does, and so do models of transformers whose file does not say do_pad.)
    states_it = config.get("model_type", str, "").startswith(("parrot_", "multimodal_gpt")) or "vision_config" in config
    aspect_ratio = config.get("image_aspect_ratio", str) or (None if states_it else "pad")
    tower = config.get("mm_vision_tower", str) or _TOWER_FOLDER
    candidates = [directory, directory / tower, directory / _TOWER_FOLDER]
    for candidate in candidates:
        if os.path.isfile(file := candidate / PREPROCESSOR_FILE):
            values = _fields(file)
            # (Of tiles `do_pad` says something else.)
            pads = RESOLUTIONS not in values and values.get("do_pad", bool, False)
            stated = values.get("image_aspect_ratio", str) or ("pad" if pads else aspect_ratio)
            return ImageProcessor.from_dict(values.values, image_aspect_ratio=stated, file=file)
    if (known := KNOWN_TOWERS.get(Path(tower).name)) is not None:
        known_values = ImageProcessor.for_tower(known.type, known.image_size).to_dict() | {
            "exif": None,
            "transparency": None,
        }
        return ImageProcessor.from_dict(known_values, image_aspect_ratio=aspect_ratio)
    places = ", ".join(str(candidate) for candidate in dict.fromkeys(candidates))
    raise CheckpointError(
        f"{PREPROCESSOR_FILE} of the vision tower {tower!r} is in none of {places}; copy it into one of them"
    )
