"""Lengths of requests, and their names in error messages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parrot_sys.data.packing import Sample, expanded_lengths, rows_of_pictures
from parrot_sys.errors import DataError
from parrot_sys.systems.config import ParrotConfig


def request_name(index: int, sample: Sample) -> str:
    """Name of the request at a place of a batch, for error messages."""
    return f"request {index}" + (f" ({sample.record_id})" if sample.record_id else "")


def num_rows(config: ParrotConfig, sample: Sample) -> int:
    """Rows of a sample with its images."""
    rows = rows_of_pictures(sample, config.rows_per_image)
    return expanded_lengths(np.asarray(sample.input_ids), rows, config.max_rows)[1]


def free_rows(config: ParrotConfig, sample: Sample) -> int:
    """Rows that a prompt leaves for its answer; below 1 if there is no room."""
    return config.max_rows - num_rows(config, sample)


def check_rows(
    config: ParrotConfig, samples: Sequence[Sample], new_tokens: Sequence[int], *, or_else: str = ""
) -> None:
    """Refuses requests that are too long; the one limit of all that a model is asked.

    Args:
        config: of the model.
        samples: prompts, or whole samples.
        new_tokens: tokens that come after each; 0 for none.
        or_else: what the caller can do besides shortening them.

    Raises:
        DataError: a request has more than `config.max_rows` rows.
    """
    for index, (sample, new) in enumerate(zip(samples, new_tokens, strict=True)):
        rows = num_rows(config, sample)
        if rows + new > config.max_rows:
            added = f"with {new} new tokens " if new else ""
            raise DataError(
                f"{request_name(index, sample)} has {rows} rows with its images; {added}it exceeds the "
                f"{config.max_rows} positions of a request ({_limits(config)}): shorten it{or_else}"
            )


def _limits(config: ParrotConfig) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.limits.items())
