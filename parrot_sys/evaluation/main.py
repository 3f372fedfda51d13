"""`parrot eval`: answers the questions of MMMB-like tables with a checkpoint, scores them and writes a report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from parrot_sys import platform
from parrot_sys.cli import parse_config
from parrot_sys.data.decoding import ImageLimits
from parrot_sys.data.languages import language_codes
from parrot_sys.errors import ConfigError
from parrot_sys.evaluation.answering import ADVICE, OnBadQuestion, Problems, find_problems, located, problem
from parrot_sys.evaluation.extraction import Rules
from parrot_sys.evaluation.items import Item, Mode, Options, Predictor, Routing
from parrot_sys.evaluation.markdown import is_rotated
from parrot_sys.evaluation.outcomes import METRICS
from parrot_sys.evaluation.report import ReportInput, build_report
from parrot_sys.evaluation.results import Plan, find_stale, identity, remove_results
from parrot_sys.evaluation.runner import (
    evaluate_table,
    guided_questions,
    load_tables,
    logit_changes,
    make_items,
    scores_path,
    select_tables,
    settings_of,
)
from parrot_sys.evaluation.summary import offers, summary
from parrot_sys.evaluation.tsv import QuestionSet, refuse
from parrot_sys.locks import OutputLock
from parrot_sys.logging import setup_logging
from parrot_sys.markdown_tables import fixed
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.paths import INPUT, INPUT_FOLDER, OUTPUT_FOLDER
from parrot_sys.platform import DtypeName
from parrot_sys.systems.section import Compat

if TYPE_CHECKING:
    from parrot_sys.evaluation.predictor import ModelPredictor

logger = logging.getLogger(__name__)
Job = tuple[QuestionSet, Mapping[Routing, Sequence[Item]]]
"""A table and what is asked of it under each routing."""
_PROBED = 8
"""Questions per part of a table on which the route's effect on the logits is measured."""


@dataclass(kw_only=True, frozen=True, slots=True)
class EvalConfig:
    """Answers MMMB / MMBench questions with a checkpoint and reports accuracy per language and category."""

    checkpoint: Annotated[Path, INPUT_FOLDER]
    """Folder of the model: released layout, training checkpoint, or training run (its newest checkpoint)."""
    data: Annotated[tuple[Path, ...], INPUT]
    """TSV files, or folders that hold some, such as the DIR/benchmark of `parrot data build --output DIR`."""
    output: Annotated[Path, OUTPUT_FOLDER]
    """Folder for predictions, scores and the report. A run that was stopped goes on where it was."""
    languages: tuple[str, ...] = ()
    """Only tables of these languages (BCP 47 codes such as en, pt-BR); all when not given."""
    mode: Mode = "generate"
    """`generate`: greedy answer, option extracted by rules; `likelihood`: the most likely option letter;
    `text-likelihood`: the option whose text is the most likely answer."""
    options: Options = "shown"
    """`hidden`: the prompt is the question alone, and its options only what answers are compared with."""
    rules: Rules = "current"
    """Version of the public kit's extraction rules, or `lenient`: Chinese and Arabic punctuation and letters as well,
    which no kit reads. Accuracies by lenient rules are always shown next to those by the kit's."""
    routing: tuple[Routing, ...] = ("model",)
    """Routes to evaluate: the model's own, experts `off`, or guided by the question in another language."""
    limit: int | None = None
    """Questions per split of a table (with all their rotations), spread evenly; all when not given."""
    ablation_limit: int | None = None
    """The same for the routings `off` and `other-language`; `limit` when not given."""
    batch_size: int = 32
    """Questions answered together; changes speed and memory only (in half precision also the rounding)."""
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
    """Rules that a model follows where the public code differs from its paper: Wings' released weights need
    `released`. As the checkpoint says when not given."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over the processes of torchrun, for models that need several."""
    on_bad_question: OnBadQuestion = "error"
    """Handling of questions that cannot be asked (no or a broken picture, too long, ...): `error` names them all
    before the first answer and stops; `wrong` counts them as wrong and lists them in the report."""
    overwrite: bool = False
    """Answer anew what `output` holds of another checkpoint, name or other settings; it stays until that is done."""

    def __post_init__(self) -> None:
        for name in ("limit", "ablation_limit", "batch_size", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if not self.data:
            raise ConfigError("data must name at least one TSV file or folder, got nothing")
        language_codes(self.languages)
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
    tables = _load(config)  # what is wrong with the tables shows before the model is loaded
    # Other ranks write nothing.
    lock = OutputLock(config.output) if platform.launch().rank == 0 else None
    predictor = load_predictor(config)

    def program() -> int:
        results = evaluate(config, predictor, tables)
        if any(result["parts"] for result in results):
            build_report(ReportInput(evaluation=config.output, output=config.output))
            print(summary(config.output))
            print(f"\nReport: {config.output / 'report.md'}")
        print("\n".join(offers(results, config.output)))
        return 0

    try:
        return predictor.run(program)
    finally:
        if lock is not None:
            lock.release()


def load_predictor(config: EvalConfig) -> ModelPredictor:
    """The checkpoint, ready to answer."""
    # Imported late: Megatron takes seconds, and a wrong command line should not.
    from parrot_sys.engine.lockstep import check_processes
    from parrot_sys.evaluation.predictor import ModelPredictor
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
    loaded = _load(config) if loaded is None else loaded
    tables = select_tables(loaded, config.languages)
    translations: dict[str, dict[str, QuestionSet]] = {}
    for each in loaded:  # all languages guide, also those that are not evaluated
        translations.setdefault(each.suite, {})[each.language] = each
    # What is wrong with any table or with the output shows before the first answer.
    jobs = [(full, _items(config, full, translations[full.suite])) for full in tables]
    stale = _find_stale(config, predictor, jobs)
    problems = _find_problems(config, predictor, jobs)
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
                problems=problems[full.path, routing],
                on_bad=config.on_bad_question,
                notes=notes,
                extra={"logit_changes": changes} if routing == "model" else {},
            )
            _log(full, routing, result)
            results.append(result)
    for path in stale:
        remove_results(path)
    return results


def _load(config: EvalConfig) -> list[QuestionSet]:
    """All tables; unless bad questions count as wrong, those of the wanted languages without any."""
    loaded = load_tables(config.data, (), None, keep_bad=True)
    tables = select_tables(loaded, config.languages)
    if config.on_bad_question == "error":
        refuse([problem for table in tables for problem in table.problems], ADVICE)
    return loaded


def _find_problems(
    config: EvalConfig, predictor: Predictor, jobs: Sequence[Job]
) -> dict[tuple[Path, Routing], Problems]:
    """Questions of each table and routing that cannot be asked, before any is.

    Raises:
        DataError: there are some, and they must not count as wrong.
    """
    found = {
        (table.path, routing): find_problems(asked, predictor)
        for table, items in jobs
        for routing, asked in items.items()
    }
    if config.on_bad_question == "error":
        places = [place for table, items in jobs for each in items for place in located(table, found[table.path, each])]
        refuse(list(dict.fromkeys(places)), ADVICE)
    return found


def _items(
    config: EvalConfig, table: QuestionSet, translations: Mapping[str, QuestionSet]
) -> dict[Routing, list[Item]]:
    items = {}
    for routing in config.routing:
        limit = config.limit_of(routing)
        asked = table.limited(limit) if limit else table
        items[routing] = make_items(asked, routing, translations, show_options=config.options == "shown")
    return items


def _find_stale(config: EvalConfig, predictor: Predictor, jobs: Sequence[Job]) -> list[Path]:
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
    return find_stale(config.output, plans, wanted, overwrite=config.overwrite)


def _log(table: QuestionSet, routing: Routing, result: Mapping[str, Any]) -> None:
    scores = {part: each["scores"] for part, each in result["parts"].items()}
    metrics = METRICS if is_rotated(scores) else METRICS[:1]
    parts = [
        f"{part} {' / '.join(fixed(each[metric], 1) for metric in metrics)} % (n = {each['n']})"
        for part, each in scores.items()
    ]
    text = f"{' / '.join(metrics)} accuracy: {', '.join(parts)}" if parts else "no answers to score"
    logger.info("%s, routing %s, %s", table.name, routing, text)


def _measure_routes(
    table: QuestionSet, translations: Mapping[str, QuestionSet], predictor: Predictor
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Measures how much other routes change the logits of each part; notes where they change none.

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
    if not predictor.has_choice:
        notes.append("There is one expert: the language of a question cannot change its route.")
    probes: dict[Routing, dict[str, QuestionSet]] = {
        "off": shown,
        "other-language": {name: part for name, part in guided.items() if part.questions and predictor.has_choice},
    }
    found: dict[str, dict[str, Any]] = {}
    for routing, parts in probes.items():
        items = {
            name: items
            for name, part in parts.items()
            if (items := _probed(make_items(part.limited(_PROBED), routing, translations), predictor))
        }
        changes = logit_changes(items, predictor, routing) if items else {}
        if changes and not any(changes.values()):
            count = sum(map(len, items.values()))
            notes.append(f"Routing {routing!r} changes no logit over {count} questions: there the experts do nothing.")
            logger.warning(notes[-1])
        for name, change in changes.items():
            found.setdefault(name, {})[routing] = {"change": change, "n": len(items[name])}
    return found, notes


def _probed(items: Sequence[Item], predictor: Predictor) -> list[Item]:
    return [item for item in items if not problem(item, predictor)][:_PROBED]
