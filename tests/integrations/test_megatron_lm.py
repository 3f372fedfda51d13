"""Megatron-LM's own MoE tests and its program of pretraining, with our router and experts in every MoELayer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integrations.peer_losses import LAYOUTS, Layout, losses
from tests.integrations.peer_suite import FILES, compare

pytestmark = pytest.mark.skipif(
    Path(sys.prefix).name != "megatron_lm", reason="half an hour: make test-integrations ARGS=megatron_lm"
)
VERSIONS = ("0.16.1", "0.19.0")
LAST_DIGIT = 1e-6
"""Of the losses as Megatron-LM prints them. They are float32, whose steps at 4.6 are half of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peer")


@pytest.mark.parametrize("version", VERSIONS)
def test_tests_that_pass_with_the_peers_parts_pass_with_ours_or_are_refused(version: str, folder: Path) -> None:
    result = compare(version, FILES, folder)
    assert result["theirs"]["passed"] > 100
    assert result["files"] == set(FILES)
    assert result["lost"] == []
    assert len(result["refused"]) == 1, "as docs/embedding.md says"


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])
@pytest.mark.parametrize("version", VERSIONS)
def test_pretraining_has_the_losses_of_the_peers_parts(version: str, layout: Layout, folder: Path) -> None:
    theirs = losses(version, folder, layout, ours=False)
    ours = losses(version, folder, layout, ours=True)
    assert ours == pytest.approx(theirs, rel=0, abs=1.01 * LAST_DIGIT), "more than one unit of the last digit"
    assert len(set(ours)) == len(ours), "the weights change"
