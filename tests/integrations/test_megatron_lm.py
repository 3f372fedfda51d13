"""Megatron-LM's own MoE tests with our router and experts in every MoELayer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.peer_suite import compare


# (peer_suite.FILES has the others, which nobody has run with our parts yet.)
@pytest.mark.parametrize(("version", "files"), [("0.16.1", ["moe_layer"])])
def test_tests_that_pass_with_the_peers_parts_pass_with_ours_or_are_refused(
    version: str, files: list[str], tmp_path: Path
) -> None:
    result = compare(version, files, tmp_path)
    assert result["theirs"]["passed"] > 0
    assert result["lost"] == []
