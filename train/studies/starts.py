"""Common start of the cells of several experiments: one text-pretrained decoder, for all variants and seeds."""

from __future__ import annotations

from studies import recipes
from studies.experiment import Run
from studies.pipeline import Step
from studies.recipes import PLAIN, PRETRAIN, System

SLOW = ("--optimizer.lrs.llm", "5e-5", "--optimizer.min-lr", "5e-6")
"""Rates of the decoder in `tiny_wings_instruct`, a fortieth of that of the other parts."""


def text_model(run: Run, system: System = PLAIN) -> Step:
    """The small model after the stage that reads text alone, the same for all seeds."""
    flags = ["--checkpoint.keep-last", "1", *run.flags]
    return recipes.train(run.pipeline, system, PRETRAIN, run.data, name=f"{run.folder}pretrain", flags=flags)


def text_decoder(run: Run) -> Step:
    """Its decoder, from which models of any system start, their other parts from initial weights."""
    return recipes.bare_decoder(run.pipeline, text_model(run), run.data, name=f"{run.folder}decoder")


def cached(run: Run) -> list[str]:
    """Settings of `parrot train` by which the runs of all cells compute features and indexes once."""
    return ["--data.cache-dir", str(run.pipeline.root / "cache")]
