"""What every test gets: fixed seeds, one thread, and no GPU tests where there is no GPU."""

from __future__ import annotations

import os
import random

import hypothesis
import numpy as np
import pytest
import torch

from parrot_sys import platform

# Before anything imports triton: where there is no GPU its kernels run in the interpreter (docs/kernels.md).
if not platform.cuda_available():
    os.environ["TRITON_INTERPRET"] = "1"

# More threads than one only add noise here, and ranks forked from this process must not find a used OpenMP pool.
torch.set_num_threads(1)


# A slow moment of a shared machine is no failure.
hypothesis.settings.register_profile("parrot", deadline=None)
hypothesis.settings.load_profile("parrot")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="FOLDER", help="leave the screenshots of the page here")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


_PROCESSES = frozenset({"integration", "megatron", "parallel", "training"})
"""Folders of tests that start several processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # `make test` shares files between two workers; more than one such test at a time would crowd two cores.
        group = "processes" if item.path.parent.name in _PROCESSES else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    if platform.cuda_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
