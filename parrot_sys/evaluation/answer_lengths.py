"""`parrot compare`: how long two evaluated models answer the same questions.

Training data with short answers make a model terse (MultiModal-GPT, arXiv 2305.04790, section 4.1); accuracy alone does
not show it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from parrot_sys.cli import parse_config
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.evaluation.outcomes import Outcome, clusters, read_outcomes
from parrot_sys.evaluation.results import ScoreFile, read_score_files
from parrot_sys.evaluation.runner import SCORES_SUFFIX
from parrot_sys.evaluation.statistics import mean_margin, paired_test
from parrot_sys.files import errors_named
from parrot_sys.markdown_tables import fixed, p_value, table
from parrot_sys.paths import INPUT_FOLDER, OUTPUT_FOLDER

SHORT = 2
"""Answers of at most so many words count as short."""
_WORD = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+")
_ALL = "all"


@dataclass(kw_only=True, frozen=True, slots=True)
class CompareConfig:
    """Compares the answers of two models to the same questions by their lengths, question by question."""

    evaluations: Annotated[tuple[Path, Path], INPUT_FOLDER]
    """Two output folders of `parrot eval` with generated answers (`--mode generate`) to the same tables."""
    names: tuple[str, str] = ("first", "second")
    """Names of the two models in the report."""
    output: Annotated[Path | None, OUTPUT_FOLDER] = None
    """Folder for lengths.md and lengths.json; printed only when not given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Words of the answers of one model."""

    mean: float
    median: float
    short: float
    """Share of answers of at most `SHORT` words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Lengths of the answers of two models to the same questions."""

    questions: int
    first: Lengths
    second: Lengths
    difference: float
    """Mean of second minus first, over the questions, in words."""
    margin: float
    """Half of the 95% interval of `difference`, clustered by picture; infinite for a single question or picture."""
    longer: int
    """Questions whose second answer is longer."""
    shorter: int
    p: float
    """Two-sided, of the paired test that exchanges the two models for all questions about a picture."""


def count_words(text: str) -> int:
    """Stretches without a blank; Chinese characters, which are written without blanks, count as words each."""
    return len(_WORD.findall(text))


def repeats_itself(text: str) -> bool:
    """Whether two neighbouring words stand together again later in the text, or a word twice in a row."""
    words = _WORD.findall(text.casefold())
    pairs = list(itertools.pairwise(words))
    return len(set(pairs)) < len(pairs) or any(first == second for first, second in pairs)


def compare_answers(answers: Sequence[tuple[str, str]], shared: Sequence[Outcome] | None = None) -> Comparison:
    """Lengths of pairs of answers to the same question.

    Args:
        answers: (of the first model, of the second), one pair for each question; at least one.
        shared: the outcome of each question, whose picture says which belong together; none do when not given.
    """
    first, second = [count_words(mine) for mine, _ in answers], [count_words(yours) for _, yours in answers]
    numbers = np.arange(len(answers)) if shared is None else clusters(shared)
    test = paired_test(second, first, numbers)
    return Comparison(
        questions=len(answers),
        first=_lengths(first),
        second=_lengths(second),
        difference=test.difference,
        margin=mean_margin([yours - mine for mine, yours in zip(first, second, strict=True)], numbers),
        longer=test.first_only,
        shorter=test.second_only,
        p=test.p,
    )


def _lengths(words: Sequence[int]) -> Lengths:
    return Lengths(
        mean=statistics.fmean(words),
        median=statistics.median(words),
        short=sum(count <= SHORT for count in words) / len(words),
    )


def compare_evaluations(first: Path, second: Path) -> dict[str, Comparison]:
    """Table -> comparison over the questions that both models answered, and one over all tables under `all`.

    Raises:
        ConfigError: no table in common, or tables of the same name that differ, or answers that are no text.
        DataError: a file is missing or damaged.
    """
    ours, theirs = _score_files(first), _score_files(second)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise ConfigError(
            f"evaluations must share a table, got {', '.join(sorted(ours)) or 'none'} in {first} and "
            f"{', '.join(sorted(theirs)) or 'none'} in {second}"
        )
    pairs: dict[str, list[tuple[tuple[str, str], Outcome]]] = {}
    for name in common:
        digests = [file.content["settings"]["table"] for file in (ours[name], theirs[name])]
        if digests[0] != digests[1]:
            raise ConfigError(
                f"the tables {name} of {first} and {second} differ: evaluate both models on the same files"
            )
        mine, yours = read_answers(ours[name]), read_answers(theirs[name])
        outcomes = {outcome.index: outcome for outcome in count_answers(ours[name])}
        if shared := sorted(mine.keys() & yours.keys()):
            pairs[name] = [((mine[index], yours[index]), outcomes[index]) for index in shared]
    if not pairs:
        raise ConfigError(f"{first} and {second} have no question in common: evaluate both with the same --limit")
    pairs[_ALL] = [pair for each in pairs.values() for pair in each]
    return {
        name: compare_answers([answers for answers, _ in each], [outcome for _, outcome in each])
        for name, each in pairs.items()
    }


def _score_files(folder: Path) -> dict[str, ScoreFile]:
    """Table -> its scores, under the model's own routes."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no directory; wanted an output folder of parrot eval")
    files = [file for file in read_score_files(folder) if file.content["routing"] == "model"]
    for file in files:
        if (mode := file.content["settings"].get("mode")) != "generate":
            raise ConfigError(f"{file.path} holds answers of mode {mode}: evaluate with --mode generate to have texts")
    return {file.content["dataset"]: file for file in files}


def read_answers(scores: ScoreFile) -> dict[int, str]:
    """Row index -> answer.

    Raises:
        DataError: the file with the answers is missing or damaged.
    """
    path = scores.path.with_name(scores.path.name.removesuffix(SCORES_SUFFIX) + ".jsonl")
    with errors_named(path, DataError, what="cannot be read; run parrot eval again"):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[1:] if line]
        # (`prediction` is what is left for the score: often a letter alone.)
        return {int(record["index"]): str(record["response"]) for record in records}


def count_answers(scores: ScoreFile, measure: Callable[[str], int] = count_words) -> list[Outcome]:
    """Words in each answer, or what else `measure` finds in its text, as outcomes."""
    parts = scores.content.get("parts", {}).values()
    known = {outcome.index: outcome for part in parts for outcome in read_outcomes(part) or ()}
    return [
        replace(known.get(index) or Outcome(index=index, group=index, picture=None, value=0), value=measure(answer))
        for index, answer in read_answers(scores).items()
    ]


def lengths_report(comparisons: Mapping[str, Comparison], names: tuple[str, str]) -> str:
    """The comparison as Markdown."""
    header = ["table", "questions"]
    header += [f"{name}: {what}" for what in ("mean words", "median", f"<= {SHORT} words") for name in names]
    rows = [
        [
            name,
            str(each.questions),
            *(fixed(lengths.mean, 1) for lengths in (each.first, each.second)),
            *(f"{lengths.median:g}" for lengths in (each.first, each.second)),
            *(f"{fixed(100 * lengths.short, 0)}%" for lengths in (each.first, each.second)),
            f"{fixed(each.difference, 1, sign=True)} ± {_margin(each.margin)}",
            f"{each.longer} : {each.shorter}",
            p_value(each.p),
        ]
        for name, each in comparisons.items()
    ]
    lines = [f"# Lengths of the answers of {names[0]} and {names[1]}", ""]
    lines += table([*header, f"{names[1]} - {names[0]}", "longer : shorter", "p"], rows)
    lines += [
        "",
        "Words in the answers to the same questions; then their mean difference with its 95% interval, the number of "
        f"questions to which {names[1]} answers longer and shorter, and p of a paired test. Questions that share a "
        "picture count as one cluster.",
        "",
    ]
    return "\n".join(lines)


def _margin(margin: float) -> str:
    return "inf" if math.isinf(margin) else fixed(margin, 1)


def main(argv: Sequence[str]) -> int:
    """Runs `parrot compare`."""
    config = parse_config(CompareConfig, argv, prog="parrot compare")
    comparisons = compare_evaluations(*config.evaluations)
    text = lengths_report(comparisons, config.names)
    if config.output is not None:
        config.output.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "names": list(config.names),
            "tables": {name: asdict(each) for name, each in comparisons.items()},
        }
        (config.output / "lengths.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (config.output / "lengths.md").write_text(text, encoding="utf-8")
    print(text)
    return 0
