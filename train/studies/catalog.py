"""The studies by name."""

from __future__ import annotations

from collections.abc import Mapping

from studies.experiment import Experiment
from studies.joint import ANSWERS, JOINT
from studies.languages import LANGUAGES
from studies.tradeoff import WINGS_CURVE

EXPERIMENTS: Mapping[str, Experiment] = {
    "languages": LANGUAGES,
    "wings_curve": WINGS_CURVE,
    "joint": JOINT,
    "answers": ANSWERS,
}
"""Name of a study -> its experiment; all share one folder of runs, and so the steps that they have in common."""
