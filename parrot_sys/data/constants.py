"""Ids and names that data and models share."""

from __future__ import annotations

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = -200
"""Placeholder id of an image in `input_ids` (released Parrot code, parrot/utils/constants.py)."""
IGNORE_ID = -100
"""Label of rows that bear no loss."""
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
"""Ends a turn (ChatML); the end-of-sequence token of generation."""
PAD_TOKEN = "<|endoftext|>"
