"""`parrot data`: make the default data set, import public ones. (`check` knows models: training/data_check.py.)"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from parrot_sys.cli import parse_config
from parrot_sys.data.corpora.default.build import MANIFEST, DataBuildConfig, build
from parrot_sys.data.corpora.default.offered import OFFERED
from parrot_sys.data.corpora.default.phrases import load_phrases
from parrot_sys.data.corpora.default.vendor import VendorConfig, vendor
from parrot_sys.data.corpora.public.importing import DataImportConfig, import_set
from parrot_sys.data.languages import language_name, script_name, script_of
from parrot_sys.markdown_tables import table

_HELP = """usage: parrot data COMMAND [options]

  build      make the default data set: pictures, conversations in each language, tokenizer, benchmark tables
               $ parrot data build --output data/default
               $ parrot data build --output data/eight --languages en zh de hi ja sw he zh-Hant
               $ parrot data build --output data/english_heavy --mix zh=0.1,pt=0.1,ar=0.1,tr=0.1,ru=0.1
  import     turn a public data set (LLaVA, A-OKVQA, MiniGPT-4, COCO captions, OCR-VQA, VQAv2, Dolly, Alpaca, Baize,
             xGQA, MaXM, CVQA, M3Exam, Kaleidoscope, xMMMU, MaRVL) into records to train on, or questions into tables
               $ parrot data import --source cvqa --input test-00000-of-00005.parquet --output data/cvqa.tsv
               $ parrot data import --source aokvqa --input aokvqa_v1p0_train.json --images coco --limit 5000
                 --output data/mmgpt/aokvqa.json
  check      read record files once and say whether training would start with them
               $ parrot data check a.json b.jsonl --config parrot_7b --config parrot_instruct
                 --model.tokenizer-path qwen
  describe   print the mix that training would see: samples, tokens and pictures of each data set and language
               $ parrot data describe a.json b.jsonl --model.tokenizer-path qwen --data.language-alpha 0.3
                 --plot mix.svg
  languages  list the languages that the default data set can be made in
  index      read, check and tokenise data sets once, so that training starts at once with little memory
               $ parrot data index a.json b.jsonl --output data/index --config parrot_7b --model.tokenizer-path qwen
  vendor     make the vendored names and drawings again from their public sources (for maintainers)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `parrot data ...`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command == "build":
        return _build(parse_config(DataBuildConfig, rest, prog="parrot data build"))
    if command == "import":
        return _import(parse_config(DataImportConfig, rest, prog="parrot data import"))
    if command == "languages":
        parse_config(LanguagesConfig, rest, prog="parrot data languages")
        print("\n".join(_languages()))
        return 0
    if command == "vendor":
        config = parse_config(VendorConfig, rest, prog="parrot data vendor")
        print(f"{vendor(config)} concepts written to {config.output}")
        return 0
    print(_HELP, end="", file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguagesConfig:
    """Lists the languages that `parrot data build --languages` takes; the default ones come first."""


def _languages() -> list[str]:
    """Table of the languages of the default data set."""
    rows = [
        [code, language_name(code), script_name(script_of(code)), "written" if code in load_phrases() else "from CLDR"]
        for code in OFFERED
    ]
    return table(["code", "language", "script", "questions"], rows, numbers=False)


def _import(config: DataImportConfig) -> int:
    report = import_set(config)
    for problem in report.bad:
        print(f"left out: {problem}", file=sys.stderr)
    not_drawn = report.read - len(report.bad) - report.written
    what = (
        f"{len(report.tables)} tables with {report.written} questions" if report.tables else f"{report.written} records"
    )
    print(
        f"{config.output}: {what} of {report.read} rows; {len(report.bad)} left out as bad, "
        f"{not_drawn} not drawn (--limit)"
    )
    return 0


def _build(config: DataBuildConfig) -> int:
    made = build(config)
    manifest = json.loads((config.output / MANIFEST).read_text(encoding="utf-8"))
    counts = ", ".join(f"{name} {sum(languages.values())}" for name, languages in manifest["records"].items())
    print(f"{config.output}: {'built' if made else 'up to date'}; records: {counts}; pictures: {manifest['pictures']}")
    return 0
