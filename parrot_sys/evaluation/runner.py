"""Runs a model over tables: batches, resuming, option extraction, scores and files.

Everything about the model is hidden by `Predictor`, so that this module needs neither torch nor Megatron.
Files below the output folder: SUITE/ROUTING/MODEL_DATASET with the endings .jsonl, .xlsx, .tsv and .scores.json.

A score file holds `suite`, `language`, `dataset`, `routing`, `rules`, `settings`; `parts`: name -> `scores`; `experts`,
the mean routing weight of each expert, and `routes`, see `routes.route_rows`; `normalised`, the accuracies by the
likelihood per token; `rows` and `intervals`, see `outcomes.measure`; `kit_file`, `kit_refusals` and `kit_namesake`, see
`kit.KitFiles`; `bad_questions`: `row`, `index`, `reason` of each; `notes` for the report; `seconds` of the last call.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from parrot_sys.data.languages import in_order, language_codes
from parrot_sys.errors import CheckpointError, DataError
from parrot_sys.evaluation.answering import OnBadQuestion, Problems, answer, bad_questions, problem_notes
from parrot_sys.evaluation.extraction import Rules, beside, extract_option
from parrot_sys.evaluation.items import Item, Mode, Options, Predictor, Routing
from parrot_sys.evaluation.kit import write_kit_files
from parrot_sys.evaluation.outcomes import measure, normalised, score_other
from parrot_sys.evaluation.prompts import other_language, question_prompt
from parrot_sys.evaluation.routes import route_rows
from parrot_sys.evaluation.scoring import score_beside, score_table
from parrot_sys.evaluation.store import PredictionStore
from parrot_sys.evaluation.tsv import Question, QuestionSet, find_tables, read_table
from parrot_sys.files import replace_text

logger = logging.getLogger(__name__)

SCORES_SUFFIX = ".scores.json"


def load_tables(
    paths: Sequence[str | Path], languages: Sequence[str], limit: int | None, *, keep_bad: bool = False
) -> list[QuestionSet]:
    """Tables of the wanted languages (all when none is named), each cut to `limit` questions a part.

    Args:
        paths: files, and folders that hold some.
        languages: which are wanted.
        limit: questions a part.
        keep_bad: see `read_table`.

    Raises:
        DataError: no table has a wanted language, or two tables are the same benchmark or part in the same language.
    """
    tables = select_tables([read_table(path, keep_bad=keep_bad) for path in find_tables(paths)], languages)
    return [table.limited(limit) if limit else table for table in tables]


def select_tables(tables: Sequence[QuestionSet], languages: Sequence[str]) -> list[QuestionSet]:
    """Selects the tables of the wanted languages, all when none is named; see `load_tables`."""
    languages = language_codes(languages)
    if missing := sorted(set(languages) - {table.language for table in tables}):
        held = ", ".join(in_order(table.language for table in tables))
        raise DataError(f"no table for language {missing[0]!r}; the given data has {held}")
    tables = [table for table in tables if not languages or table.language in languages]
    seen: dict[tuple[str, str], Path] = {}
    for table in tables:
        names = dict.fromkeys([table.suite, *table.parts()])
        for name in names:
            if (key := (name, table.language)) in seen:
                raise DataError(
                    f"{table.path} and {seen[key]} are both {name} in {table.language}; evaluate them apart"
                )
        seen.update(dict.fromkeys(((name, table.language) for name in names), table.path))
    return tables


def make_items(
    table: QuestionSet, routing: Routing, translations: Mapping[str, QuestionSet], *, show_options: bool = True
) -> list[Item]:
    """Items of a table, with the guiding prompts that `routing` needs.

    Args:
        table: the questions.
        routing: only `other-language` needs more than the table itself.
        translations: language -> the same benchmark in that language.
        show_options: whether the prompts contain the options.

    Raises:
        DataError: the other language's table or one of its rows is missing.
    """
    guidance: dict[int, str] = {}
    problems: dict[int, str] = {}
    if routing == "other-language":
        language, other = _translation(table, translations)
        guidance = {q.index: question_prompt(q, language, show_options=show_options) for q in other.questions}
        problems = {
            q.index: f"its guiding question, {other.path.name}, row {q.row}, cannot be asked: {q.problem}"
            for q in other.questions
            if q.problem
        }
        absent = [question.index for question in table.questions if question.index not in guidance]
        if absent:
            raise DataError(
                f"{other.path} lacks index {absent[0]} of {table.path}; --routing other-language needs the same rows"
            )
    return [
        Item(
            table=table,
            question=question,
            prompt=question_prompt(question, table.language, show_options=show_options),
            guidance_prompt=guidance.get(question.index),
            problem=problems.get(question.index, ""),
        )
        for question in table.questions
    ]


def guided_questions(table: QuestionSet, translations: Mapping[str, QuestionSet]) -> QuestionSet:
    """The questions that the other language holds too; none without a table in another language."""
    if set(translations) <= {table.language}:
        return replace(table, questions=())
    held = {question.index for question in _translation(table, translations)[1].questions}
    return replace(table, questions=tuple(question for question in table.questions if question.index in held))


def _translation(table: QuestionSet, translations: Mapping[str, QuestionSet]) -> tuple[str, QuestionSet]:
    """The first language after the table's own that has a table."""
    language = other_language(table.language, translations)
    if language is None:
        raise DataError(f"--routing other-language needs {table.suite} in a second language beside {table.path}")
    return language, translations[language]


def settings_of(predictor: Predictor, options: Options) -> dict[str, Any]:
    """Everything that decides the answers, beside routing and table."""
    return {**predictor.settings, **({"options": options} if options == "hidden" else {})}


def scores_path(output: Path, table: QuestionSet, routing: Routing, model_name: str) -> Path:
    """Score file of a table under a routing."""
    return output / table.suite / routing / f"{model_name}_{table.name}{SCORES_SUFFIX}"


def evaluate_table(
    table: QuestionSet,
    items: Sequence[Item],
    predictor: Predictor,
    *,
    model_name: str,
    routing: Routing,
    rules: Rules,
    batch_size: int,
    output: Path,
    options: Options = "shown",
    overwrite: bool = False,
    problems: Problems | None = None,
    on_bad: OnBadQuestion = "error",
    notes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Answers what is not answered yet, scores the table and writes its files.

    Args:
        table: the questions.
        items: the same as prompts.
        predictor: the model.
        model_name: in file names.
        routing: of the pictures.
        rules: of the option extraction.
        batch_size: questions answered together.
        output: folder of the results.
        options: whether the prompts show them.
        overwrite: start anew where answers of other settings lie.
        problems: questions that cannot be asked and count as wrong.
        on_bad: what happens where another one turns out so.
        notes: sentences for the report.
        extra: further entries of the result.

    Returns:
        Contents of the `.scores.json` file, see this module; no such file without answers to score.
    """
    problems = dict(problems or {})
    begin = time.perf_counter()
    path = scores_path(output, table, routing, model_name)
    stem = path.parent / path.name.removesuffix(SCORES_SUFFIX)
    settings = {**settings_of(predictor, options), "routing": routing, "table": table.digest}
    with PredictionStore(stem.parent / f"{stem.name}.jsonl", settings, overwrite=overwrite) as store:
        records = answer(items, predictor, store, routing, batch_size, problems, on_bad)
    kit = write_kit_files(table, {index: record["prediction"] for index, record in records.items()}, stem)
    result = {
        **_what_was_asked(table, settings),
        "rules": rules,
        "parts": _parts(table, records, rules, settings["mode"]) if table.has_answers else {},
        **kit.entries(output),
        "bad_questions": bad_questions(table, problems),
        "notes": [*notes, *problem_notes(table, problems), *kit.notes],
        "seconds": time.perf_counter() - begin,
        **(extra or {}),
    }
    if table.has_answers:
        replace_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _what_was_asked(table: QuestionSet, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "suite": table.suite,
        "language": table.language,
        "dataset": table.name,
        "routing": settings["routing"],
        "settings": settings,
    }


def _parts(
    table: QuestionSet, records: Mapping[int, Mapping[str, Any]], rules: Rules, mode: Mode
) -> dict[str, dict[str, Any]]:
    """Part -> everything that is reported of it."""
    letters = _letters(table, records, rules)
    bad = [index for index, record in records.items() if "problem" in record]
    # likelihoods give a letter itself, which all rules read alike
    others = _letters(table, records, beside(rules)) if mode == "generate" else None
    measured = {name: measure(questions, letters, table.images) for name, questions in table.parts().items()}
    return {
        name: {
            "scores": {
                **score_table(questions, letters, bad=bad),
                **({} if others is None else {"beside": _beside(table, questions, others, beside(rules), bad)}),
            },
            "experts": mean_experts([records[question.index] for question in questions]),
            "routes": route_rows(questions, records, measured[name]["rows"]["picture"]),
            "normalised": normalised(questions, records, table.images),
            **measured[name],
        }
        for name, questions in table.parts().items()
    }


def _beside(
    table: QuestionSet,
    questions: Sequence[Question],
    letters: Mapping[int, str | None],
    rules: Rules,
    bad: Collection[int],
) -> dict[str, Any]:
    return {**score_beside(questions, letters, rules, bad=bad), **score_other(questions, letters, table.images)}


def _letters(table: QuestionSet, records: Mapping[int, Mapping[str, Any]], rules: Rules) -> dict[int, str | None]:
    return {
        question.index: None
        if "problem" in (record := records[question.index])
        else extract_option(record["prediction"], question.options, rules)
        for question in table.questions
    }


def logit_changes(parts: Mapping[str, Sequence[Item]], predictor: Predictor, routing: Routing) -> dict[str, float]:
    """How far the logits move where the route is replaced: not at all where experts do nothing.

    Args:
        parts: name of a part of a table -> some of its questions with pictures.
        predictor: the model.
        routing: what replaces the model's own routes.

    Returns:
        The largest change of a logit in each part.

    Raises:
        CheckpointError: a change is not finite, so that nothing was measured.
    """
    changes = {name: predictor.logit_change(items, routing) for name, items in parts.items()}
    count, path = sum(map(len, parts.values())), next(iter(parts.values()))[0].table.path
    if bad := [change for change in changes.values() if not math.isfinite(change)]:
        raise CheckpointError(
            f"routing {routing!r} changes the logits over {count} questions of {path} by {bad[0]}, wanted a finite "
            "number: the checkpoint's weights are damaged, or its numbers are too large for the dtype (try --dtype "
            "float32)"
        )
    return changes


def mean_experts(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean routing weight of each expert over `records`; empty without experts."""
    rows = [record["experts"] for record in records if record["experts"]]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else []
