"""`parrot eval`: answers the questions of MMMB-like tables with a checkpoint, scores them and writes a report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from parrot_sys.cli import parse_config
from parrot_sys.errors import ConfigError
from parrot_sys.evaluation.extraction import Rules
from parrot_sys.evaluation.markdown import percent, table
from parrot_sys.evaluation.report import ReportInput, build_report, headline, load_scores
from parrot_sys.evaluation.runner import (
    Mode,
    Predictor,
    Routing,
    check_experts,
    evaluate_table,
    load_tables,
    make_items,
)
from parrot_sys.evaluation.tsv import QuestionSet
from parrot_sys.logging import setup_logging
from parrot_sys.platform import DtypeName

logger = logging.getLogger(__name__)
_PROBED = 8
"""Questions per table on which the route's effect on the logits is measured."""


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
    rules: Rules = "current"
    """Version of the public kit's extraction rules."""
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
    overwrite: bool = False
    """Start anew where `output` holds answers of another checkpoint or of other settings."""

    def __post_init__(self) -> None:
        for name in ("limit", "ablation_limit", "batch_size", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if not self.data:
            raise ConfigError("data must name at least one TSV file or folder, got nothing")
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
    load_tables(config.data, config.languages, 1)  # what is wrong with the tables shows before the model is loaded
    evaluate(config, load_predictor(config))
    build_report(ReportInput(evaluation=config.output, output=config.output))
    print(summary(config.output))
    print(f"\nReport: {config.output / 'report.md'}; predictions for the public kit: {config.output}/*/*/*.xlsx")
    return 0


def load_predictor(config: EvalConfig) -> Predictor:
    """The checkpoint, ready to answer."""
    # Imported late: Megatron takes seconds, and a wrong command line should not.
    from parrot_sys.evaluation.predictor import ModelPredictor
    from parrot_sys.inference.pretrained import load_pretrained

    model, processor = load_pretrained(config.checkpoint, device=config.device, dtype=config.dtype)
    return ModelPredictor(
        model, processor, checkpoint=config.checkpoint, mode=config.mode, max_new_tokens=config.max_new_tokens
    )


def evaluate(config: EvalConfig, predictor: Predictor) -> None:
    """Answers and scores every table under every routing; results lie below `config.output`.

    Raises:
        DataError: something is wrong with a table.
        ConfigError: `output` holds other answers, or the experts are missing or bypassed.
    """
    if config.routing != ("model",) and not predictor.has_experts:
        raise ConfigError(
            f"routing {' '.join(config.routing)} needs experts, but {config.checkpoint} has none or does not use them; "
            "evaluate it with --routing model"
        )
    tables = load_tables(config.data, config.languages, None)
    translations: dict[str, dict[str, QuestionSet]] = {}
    # all languages guide, also those that are not evaluated
    for each in load_tables(config.data, (), None):
        translations.setdefault(each.suite, {})[each.language] = each
    for full in tables:
        changes = _measure_routes(full, translations[full.suite], predictor)
        for routing in config.routing:
            limit = config.limit_of(routing)
            cut = full.limited(limit) if limit else full
            result = evaluate_table(
                cut,
                make_items(cut, routing, translations[cut.suite]),
                predictor,
                model_name=config.model_name,
                routing=routing,
                rules=config.rules,
                batch_size=config.batch_size,
                output=config.output,
                overwrite=config.overwrite,
                extra={"logit_change": changes} if routing == "model" else {},
            )
            logger.info(
                "%s, routing %s, plain / circular accuracy: %s",
                cut.name,
                routing,
                ", ".join(
                    f"{part} {r['scores']['plain']:.1f} / {r['scores']['circular']:.1f} %"
                    for part, r in result["parts"].items()
                ),
            )


def _measure_routes(
    table: QuestionSet, translations: Mapping[str, QuestionSet], predictor: Predictor
) -> dict[str, float]:
    """Routing -> how much it changes the logits; fails when the experts are bypassed."""
    if not predictor.has_experts:
        return {}
    some = table.limited(_PROBED)
    routings: tuple[Routing, ...] = ("off", "other-language") if len(translations) > 1 else ("off",)
    return {
        routing: check_experts(make_items(some, routing, translations)[:_PROBED], predictor, routing)
        for routing in routings
    }


def summary(output: Path) -> str:
    """Headline accuracies of everything below `output` as a table for the terminal."""
    scores = load_scores(output)
    lines: list[str] = []
    for suite, routings in scores.items():
        languages = list(next(iter(routings.values())))
        metric = headline(next(iter(next(iter(routings.values())).values()))["dataset"])
        rows = []
        for key in ("plain", "circular"):
            for routing, results in routings.items():
                cells: list[Any] = [results[lang]["scores"][key] if lang in results else None for lang in languages]
                rows.append([f"{key}{' *' if key == metric else ''}, routing {routing}", *map(percent, cells)])
        lines += ["", *table([f"{suite}: accuracy in %", *languages], rows)]
    return "\n".join([*lines, "", "* the accuracy that the public kit reports for this set"])
