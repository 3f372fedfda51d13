"""What the parts of the plugin read of an exported directory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import CheckpointError, DataError
from parrot_sys.files import read_json
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.hf_config import CONFIG, config_from_hf

MARKER_TEXT = "<image>"
"""Stands for a picture in a prompt."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Configuration and processor of an exported directory."""

    directory: Path
    config: ParrotConfig
    processor: ParrotProcessor
    marker: int
    """Id that holds the place of a picture's rows: vLLM knows no ids outside the vocabulary."""

    def prompt_ids(self, prompt: str | Sequence[int], num_images: int) -> list[int]:
        """Ids of a prompt with `marker` for each picture.

        Stretches between pictures are tokenised each on its own, as in training: in `<image>\\n` a tokenizer that sees
        all of it makes one token of `>\\n`.

        Args:
            prompt: text with `<image>` for each picture, its ids, or ids that have `marker` (or -200) already.
            num_images: pictures of the request.

        Raises:
            DataError: the prompt has another number of places than there are pictures.
        """
        tokenizer: Any = self.processor.tokenizer
        if not isinstance(prompt, str):
            ids = [self.marker if i == IMAGE_TOKEN_ID else i for i in prompt]
            if ids.count(self.marker) == num_images:
                return ids
            prompt = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        stretches = [tokenizer.encode(part, add_special_tokens=False) for part in prompt.split(MARKER_TEXT)]
        if len(stretches) - 1 != num_images or any(self.marker in part for part in stretches):
            raise DataError(
                f"the prompt has {len(stretches) - 1} times {MARKER_TEXT} for {num_images} pictures: there must be one "
                f"for each, and no token {self.marker}, which holds their places"
            )
        joined = list(stretches[0])
        for part in stretches[1:]:
            joined += [self.marker, *part]
        return joined

    def guidance(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The text that guides the routes of all pictures of a prompt."""
        return tuple(i for i in ids if i != self.marker) if self.config.moe.num_experts else ()


@functools.lru_cache(maxsize=4)
def open_checkpoint(path: str) -> Checkpoint:
    """Reads an exported directory.

    Raises:
        CheckpointError: there is none at `path`, or no id is left for the places of pictures.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{path} is no directory: parrot-vllm takes an exported checkpoint on this machine")
    config = config_from_hf(read_json(directory / CONFIG), directory)
    processor = ParrotProcessor.from_pretrained(directory)
    processor.check_fits(config.llm.vocab_size, config.vision.image_size, directory, tiling=config.tiling)
    return Checkpoint(directory, config, processor, _marker(processor.tokenizer, config, directory))


def _marker(tokenizer: Any, config: ParrotConfig, directory: Path) -> int:
    """The last id of the vocabulary if no token has it, else a control token that no prompt needs."""
    last = config.llm.vocab_size - 1
    if last not in set(tokenizer.get_vocab().values()):
        return last
    for spare in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        if spare is not None and spare != tokenizer.eos_token_id:
            return spare
    raise CheckpointError(f"{directory}: every id of the vocabulary is in use, so none can hold the place of a picture")
