"""Tasks of lmms-eval from the tables that `parrot eval` reads: MMMB, MMBench in any language, and others like them.

A task is a YAML file and the questions beside it. Prompts, reading of the answers and verdicts are those of
`parrot eval`, whose functions they come from.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.errors import DataError
from parrot_sys.evaluation.extraction import extract_option
from parrot_sys.evaluation.prompts import clean_answer, question_prompt
from parrot_sys.evaluation.tsv import QuestionSet, picture_bytes, read_table, refuse

_MODULE = "tables.py"
_TASK = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function tables.pictures
doc_to_text: !function tables.prompt
doc_to_target: answer
process_results: !function tables.verdict
generation_kwargs:
  max_new_tokens: 512
  do_sample: false
  until: []
metric_list:
  - metric: accuracy
    aggregation: !function tables.accuracy
    higher_is_better: true
  - metric: circular_accuracy
    aggregation: !function tables.circular_accuracy
    higher_is_better: true
metadata:
  version: 1
"""
_FUNCTIONS = (
    "from parrot_sys.integrations.lmms_eval.tables import accuracy, circular_accuracy, pictures, prompt, verdict\n"
)


def write_tasks(tables: Sequence[Path], folder: Path) -> list[str]:
    """Writes a task for each table into a folder, for lmms-eval's `--include_path`; returns their names.

    Raises:
        DataError: a table is broken, has no answers, holds earlier turns, or has a name that cannot be a task's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MODULE).write_text(_FUNCTIONS, encoding="utf-8")
    of_kit = _names_of_kit()
    written: dict[str, Path] = {}
    for table in map(read_table, tables):
        refuse([] if table.has_answers else [f"{table.path} has no answers, so that nothing can be scored"])
        refuse([f"{table.path} holds earlier turns, which tasks do not show"] if _has_history(table) else [])
        name = table.name.lower()
        _check_name(name, table.path, written, of_kit)
        lines = (json.dumps(row, ensure_ascii=False) for row in _rows(table))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        task, file = (json.dumps(text, ensure_ascii=False) for text in (name, f"{name}.jsonl"))
        (folder / f"{name}.yaml").write_text(_TASK.format(task=task, file=file), encoding="utf-8")
        written[name] = table.path
    return list(written)


def _check_name(name: str, table: Path, written: Mapping[str, Path], of_kit: Collection[str]) -> None:
    """
    Raises:
        DataError: lmms-eval would take the name for others, or for another task.
    """
    if not re.fullmatch(r"[\w.+-]+", name):
        raise DataError(f"a task's name takes letters, digits and _.+-, got {name!r} from {table}: rename the file")
    if name in written:
        raise DataError(f"two tables would be the task {name}, {written[name]} and {table}: rename one")
    if name in of_kit:
        raise DataError(f"lmms-eval has a task {name} of its own, which would run instead: rename {table}")


def _names_of_kit() -> set[str]:
    """Names that lmms-eval's own tasks, groups and tags have, if it is installed."""
    found = importlib.util.find_spec("lmms_eval")
    if found is None or not found.submodule_search_locations:
        return set()
    names = re.compile(r"^(?:task|group|tag):[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)
    files = (Path(found.submodule_search_locations[0]) / "tasks").rglob("*.yaml")
    return {name for file in files for name in names.findall(file.read_text(encoding="utf-8"))}


def _has_history(table: QuestionSet) -> bool:
    return any(question.history for question in table.questions)


def _rows(table: QuestionSet) -> list[dict[str, Any]]:
    return [
        {
            "index": question.index,
            "group": question.group,
            "prompt": question_prompt(question, table.language).removeprefix(f"{IMAGE_TOKEN}\n"),
            "image": None if question.image_key is None else table.images[question.image_key],
            "options": json.dumps(dict(question.options), ensure_ascii=False),
            "answer": question.answer,
        }
        for question in table.questions
    ]


def pictures(document: Mapping[str, Any]) -> list[Image.Image]:
    """The picture of a question, if it has one, as it is stored."""
    cell = document["image"]
    return [] if cell is None else [Image.open(io.BytesIO(picture_bytes(cell)))]


def prompt(document: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """Text of a question with its options and the instruction in its language."""
    return str(document["prompt"])


def verdict(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The letter that an answer names, and whether it is right."""
    options = json.loads(document["options"])
    letter = extract_option(clean_answer(results[0], document["prompt"]), options)
    own = {"index": document["index"], "group": document["group"], "letter": letter}
    own["right"] = letter == document["answer"]
    return {"accuracy": own, "circular_accuracy": own}


def accuracy(results: Sequence[Mapping[str, Any]]) -> float:
    """Share of the rows with a right answer."""
    return sum(own["right"] for own in results) / len(results)


def circular_accuracy(results: Sequence[Mapping[str, Any]]) -> float:
    """Share of the questions of which every row, with the options in another order, has a right answer."""
    groups: dict[int, bool] = {}
    for own in results:
        groups[own["group"]] = groups.get(own["group"], True) and own["right"]
    return sum(groups.values()) / len(groups)
