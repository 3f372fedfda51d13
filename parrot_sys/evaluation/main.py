"""`parrot eval`: answers the questions of MMMB-like tables with a checkpoint, scores them and writes a report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from parrot_sys import platform
from parrot_sys.cli import parse_config
from parrot_sys.data.decoding import ImageLimits
from parrot_sys.errors import ConfigError
from parrot_sys.evaluation.extraction import Rules
from parrot_sys.evaluation.headlines import measure_of, metric_of
from parrot_sys.evaluation.markdown import INTERVAL, is_rotated
from parrot_sys.evaluation.outcomes import METRICS
from parrot_sys.evaluation.report import ReportInput, build_report, load_scores
from parrot_sys.evaluation.results import Plan, identity, make_room
from parrot_sys.evaluation.runner import (
    Item,
    Mode,
    Options,
    Predictor,
    Routing,
    check_experts,
    evaluate_table,
    guided_questions,
    load_tables,
    make_items,
    scores_path,
    select_tables,
    settings_of,
)
from parrot_sys.evaluation.tsv import QuestionSet
from parrot_sys.logging import setup_logging
from parrot_sys.markdown_tables import fixed, interval_text, percent, table
from parrot_sys.megatron.initialize import ParallelConfig
from parrot_sys.models.parrot import Compat
from parrot_sys.platform import DtypeName

if TYPE_CHECKING:
    from parrot_sys.evaluation.predictor import ModelPredictor

logger = logging.getLogger(__name__)
_PROBED = 8
"""Questions per part of a table on which the route's effect on the logits is measured."""


@dataclass(kw_only=True, frozen=True, slots=True)
class EvalConfig:
    """Answers MMMB / MMBench questions with a checkpoint and reports accuracy per language and category."""

    checkpoint: Path
    """Folder of the model: released layout, training checkpoint, or training run (its newest checkpoint)."""
    data: tuple[Path, ...]
    """TSV files, or folders that hold some, such as the DIR/benchmark of `parrot data build --output DIR`."""
    output: Path
    """Folder for predictions, scores and the report. A run that was stopped goes on where it was."""
    languages: tuple[Literal["en", "zh", "pt", "ar", "tr", "ru"], ...] = ()
    """Only tables of these languages; all when not given."""
    mode: Mode = "generate"
    """`generate`: greedy answer, option extracted by rules; `likelihood`: the most likely option letter;
    `text-likelihood`: the option whose text is the most likely answer."""
    options: Options = "shown"
    """`hidden`: the prompt is the question alone, and its options only what answers are compared with."""
    rules: Rules = "current"
    """Version of the public kit's extraction rules, or `lenient`: Chinese and Arabic punctuation and letters as well,
    which no kit reads. Accuracies by lenient rules always stand next to those by the kit's."""
    routing: tuple[Routing, ...] = ("model",)
    """Routes to evaluate: the model's own, experts `off`, or guided by the question in another language."""
    limit: int | None = None
    """Questions per split of a table (with all their rotations), spread evenly; all when not given."""
    ablation_limit: int | None = None
    """The same for the routings `off` and `other-language`; `limit` when not given."""
    batch_size: int = 32
    """Questions answered together; changes speed and memory only."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    name: str = ""
    """Name of the model in file names; the checkpoint's folder name when not given."""
    device: str | None = None
    """Where the model runs; the GPU if there is one, else the CPU."""
    dtype: DtypeName | None = None
    """Type of parameters and activations; that of the checkpoint when not given."""
    image_limits: ImageLimits = field(default_factory=ImageLimits)
    """Largest pictures that are read."""
    allow_non_finite: bool = False
    """Load NaN and infinite weights with a warning; otherwise they are an error that names their tensors."""
    compat: Compat | None = None
    """Whose rules a model follows where the public code does other than its paper: Wings' released weights need
    `released`. As the checkpoint says when not given."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over the processes of torchrun, for models that need several."""
    overwrite: bool = False
    """Delete what `output` holds of another checkpoint, name or other settings, and start anew."""

    def __post_init__(self) -> None:
        for name in ("limit", "ablation_limit", "batch_size", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if not self.data:
            raise ConfigError("data must name at least one TSV file or folder, got nothing")
        if self.options == "hidden" and self.mode == "likelihood":
            raise ConfigError(
                "mode likelihood takes an option's letter, which options hidden does not show; use text-likelihood"
            )
        if not self.routing or len(set(self.routing)) < len(self.routing):
            raise ConfigError(f"routing must name each wanted routing once, got {' '.join(self.routing) or 'nothing'}")
        if self.output.resolve().is_relative_to(self.checkpoint.resolve()):
            raise ConfigError(f"output must lie outside the checkpoint {self.checkpoint}, got {self.output}")

    @property
    def model_name(self) -> str:
        """Name of the model in file names."""
        return self.name or self.checkpoint.resolve().name

    def limit_of(self, routing: Routing) -> int | None:
        """Questions per split under `routing`."""
        return self.limit if routing == "model" or self.ablation_limit is None else self.ablation_limit


def main(argv: Sequence[str]) -> int:
    """Runs `parrot eval`."""
    config = parse_config(EvalConfig, argv, prog="parrot eval")
    setup_logging()
    tables = load_tables(config.data, (), None)  # what is wrong with the tables shows before the model is loaded
    select_tables(tables, config.languages)
    predictor = load_predictor(config)

    def program() -> int:
        results = evaluate(config, predictor, tables)
        if any(result["parts"] for result in results):
            build_report(ReportInput(evaluation=config.output, output=config.output))
            print(summary(config.output))
            print(f"\nReport: {config.output / 'report.md'}")
        print("\n".join(offers(results, config.output)))
        return 0

    return predictor.run(program)


def load_predictor(config: EvalConfig) -> ModelPredictor:
    """The checkpoint, ready to answer."""
    # Imported late: Megatron takes seconds, and a wrong command line should not.
    from parrot_sys.evaluation.predictor import ModelPredictor
    from parrot_sys.inference.lockstep import check_processes
    from parrot_sys.inference.pretrained import load_pretrained

    check_processes(config.parallel, platform.launch().world_size)
    model, processor = load_pretrained(
        config.checkpoint,
        device=config.device,
        dtype=config.dtype,
        parallel=config.parallel,
        compat=config.compat,
        allow_non_finite=config.allow_non_finite,
    )
    return ModelPredictor(
        model,
        processor.with_image_limits(config.image_limits),
        checkpoint=config.checkpoint,
        mode=config.mode,
        max_new_tokens=config.max_new_tokens,
    )


def evaluate(
    config: EvalConfig, predictor: Predictor, loaded: Sequence[QuestionSet] | None = None
) -> list[dict[str, Any]]:
    """Answers and scores every table under every routing; results lie below `config.output`.

    Args:
        config: what to do.
        predictor: the model.
        loaded: all tables of `config.data`; read when not given.

    Returns:
        What `evaluate_table` returned for each table and routing.

    Raises:
        DataError: something is wrong with a table.
        ConfigError: `output` holds other answers, or the experts are missing or bypassed.
    """
    if config.routing != ("model",) and not predictor.has_experts:
        raise ConfigError(
            f"routing {' '.join(config.routing)} needs experts, but {config.checkpoint} has none or does not use them; "
            "evaluate it with --routing model"
        )
    loaded = load_tables(config.data, (), None) if loaded is None else loaded
    tables = select_tables(loaded, config.languages)
    translations: dict[str, dict[str, QuestionSet]] = {}
    for each in loaded:  # all languages guide, also those that are not evaluated
        translations.setdefault(each.suite, {})[each.language] = each
    # What is wrong with any table or with the output shows before the first answer.
    jobs = [(full, _items(config, full, translations[full.suite])) for full in tables]
    _make_room(config, predictor, jobs)
    results = []
    for full, items in jobs:
        changes, notes = _measure_routes(full, translations[full.suite], predictor)
        for routing, asked in items.items():
            result = evaluate_table(
                asked[0].table,
                asked,
                predictor,
                model_name=config.model_name,
                routing=routing,
                rules=config.rules,
                batch_size=config.batch_size,
                output=config.output,
                options=config.options,
                overwrite=config.overwrite,
                notes=notes,
                extra={"logit_changes": changes} if routing == "model" else {},
            )
            _log(full, routing, result)
            results.append(result)
    return results


def _items(
    config: EvalConfig, table: QuestionSet, translations: Mapping[str, QuestionSet]
) -> dict[Routing, list[Item]]:
    items = {}
    for routing in config.routing:
        limit = config.limit_of(routing)
        asked = table.limited(limit) if limit else table
        items[routing] = make_items(asked, routing, translations, show_options=config.options == "shown")
    return items


def _make_room(
    config: EvalConfig, predictor: Predictor, jobs: Sequence[tuple[QuestionSet, Mapping[Routing, Sequence[Item]]]]
) -> None:
    plans = [
        Plan(
            path=scores_path(config.output, table, routing, config.model_name),
            table=table.digest,
            cells=frozenset((part, table.language) for part in table.parts()),
        )
        for table, items in jobs
        if table.has_answers
        for routing in items
    ]
    wanted = identity(config.model_name, config.rules, settings_of(predictor, config.options))
    make_room(config.output, plans, wanted, overwrite=config.overwrite)


def _log(table: QuestionSet, routing: Routing, result: Mapping[str, Any]) -> None:
    scores = {part: each["scores"] for part, each in result["parts"].items()}
    metrics = METRICS if is_rotated(scores) else METRICS[:1]
    parts = [
        f"{part} {' / '.join(fixed(each[metric], 1) for metric in metrics)} % (n = {each['n']})"
        for part, each in scores.items()
    ]
    text = f"{' / '.join(metrics)} accuracy: {', '.join(parts)}" if parts else "no answers to score"
    logger.info("%s, routing %s, %s", table.name, routing, text)


def offers(results: Sequence[Mapping[str, Any]], output: Path) -> list[str]:
    """Lines on the files for the public kit: which there are, and which tables it would refuse and why.

    Args:
        results: from `evaluate`.
        output: folder that they lie in.
    """
    lines: dict[str, None] = {}
    for result in results:
        name, kit_file = result["dataset"], result["kit_file"]
        if kit_file is None:
            lines[f"Not for the public kit: {name}, as {'; '.join(result['kit_refusals'])}"] = None
        elif result["parts"]:
            lines[f"Predictions for the public kit: {output}/*/*/*.xlsx"] = None
        else:
            lines[f"Predictions to hand in ({name} has no answers to score): {output / kit_file}"] = None
    namesakes = dict.fromkeys(result["dataset"] for result in results if result["kit_namesake"])
    if namesakes:
        lines[
            f"Of {', '.join(namesakes)} the public kit downloads other tables, and it would score these predictions "
            "against those: give tables and predictions another name first"
        ] = None
    return list(lines)


def _measure_routes(
    table: QuestionSet, translations: Mapping[str, QuestionSet], predictor: Predictor
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """How much other routes change the logits of each part; fails when the experts are bypassed.

    Returns:
        Part -> routing -> `change` and the number `n` of questions it was measured on, and notes for the report.
    """
    notes = list(predictor.notes)
    shown = {
        name: replace(table, questions=tuple(question for question in questions if question.image_key is not None))
        for name, questions in table.parts().items()
    }
    shown = {name: part for name, part in shown.items() if part.questions}
    if not predictor.has_experts or not shown:
        return {}, notes
    guided = {name: guided_questions(part, translations) for name, part in shown.items()}
    without = [name for name, part in guided.items() if not part.questions]
    if without:
        why = "the other language's table holds none of its questions"
        if len(translations) < 2:
            why = f"--data holds {table.suite} in no second language"
        where = table.name if len(without) == len(shown) else f"{', '.join(without)} of {table.name}"
        notes.append(f"Whether another language's route changes the logits was not checked on {where}: {why}.")
        logger.warning(notes[-1])
    probes: dict[Routing, dict[str, QuestionSet]] = {
        "off": shown,
        "other-language": {name: part for name, part in guided.items() if part.questions},
    }
    found: dict[str, dict[str, Any]] = {}
    for routing, parts in probes.items():
        items = {
            name: make_items(part.limited(_PROBED), routing, translations)[:_PROBED] for name, part in parts.items()
        }
        for name, change in (check_experts(items, predictor, routing) if items else {}).items():
            found.setdefault(name, {})[routing] = {"change": change, "n": len(items[name])}
    return found, notes


def summary(output: Path) -> str:
    """Headline accuracies of everything below `output` as a table for the terminal."""
    scores = load_scores(output)
    measure = measure_of(scores)
    lines: list[str] = []
    for suite, routings in scores.items():
        languages = list(next(iter(routings.values())))
        metrics = METRICS if any(is_rotated(_scores(held)) for held in routings.values()) else METRICS[:1]
        rows: list[list[str]] = []
        for key in metrics:
            star = " *" if key == metric_of(routings) else ""
            for routing, held in routings.items():
                rows += _summary_rows(f"{key}{star}, routing {routing}", _scores(held), key, languages)
        own = _scores(routings.get("model", {}))
        beside = {language: each["beside"] for language, each in own.items() if "beside" in each}
        for key in metrics if beside else ():
            rows += _summary_rows(f"{key}, {next(iter(beside.values()))['rules']} rules", beside, key, languages)
        counts = _scores(next(iter(routings.values())))
        rows.append(["n rows", *(str(counts[language]["n"]) for language in languages)])
        lines += ["", *table([f"{suite}: accuracy in %", *languages], rows)]
    kit = "the accuracy that the public kit reports for this set" if measure.public_kit else measure.answers
    return "\n".join([*lines, "", f"Intervals are clustered by picture. * {kit}"])


def _scores(languages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Language -> scores with their intervals."""
    return {
        language: {**result["scores"], **({"intervals": result["intervals"]} if "intervals" in result else {})}
        for language, result in languages.items()
    }


def _summary_rows(
    name: str, scores: Mapping[str, Mapping[str, Any]], metric: str, languages: Sequence[str]
) -> list[list[str]]:
    """A row of accuracies, and one of their intervals where there are any."""
    cells = [scores.get(language, {}) for language in languages]
    rows = [[name, *(percent(cell.get(metric)) for cell in cells)]]
    if any("intervals" in cell for cell in cells):
        rows.append([INTERVAL, *(interval_text(cell.get("intervals", {}).get(metric)) for cell in cells)])
    return rows
