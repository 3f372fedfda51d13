"""`parrot data build`: pictures, conversations for each stage, a tokenizer and benchmark tables, from vendored assets.

DIR/manifest.json           settings, their hash, and what was written
DIR/text.json               stage 0: conversations about words, no pictures
DIR/align.json              stage 1: what does the picture show?
DIR/detail.json             the same question with long answers: name, category and keywords
DIR/instruct.json           stage 2: several kinds of questions, some with several turns, some without a picture
DIR/validation.json         multiple-choice questions about pictures of training concepts that no training set holds
DIR/images/                 pictures in the training style and their variants
DIR/benchmark/mmmb_*.tsv    held-out questions: split `style` (known concept, new drawing style), `concept` (unknown)
DIR/iit/iit_*.tsv           dialogues that end in a question with or without a picture (dialogues.py)
DIR/tokenizer/              a small Qwen2 tokenizer
DIR/decoder/                the small decoder that stage 0 starts from: a Qwen2 checkpoint with that tokenizer
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tokenizers import Tokenizer
from tqdm import tqdm

from parrot_sys.data.constants import IM_END, IM_START, IMAGE_TOKEN
from parrot_sys.data.corpora.default.concepts import Concept, choose_concepts, load_concepts
from parrot_sys.data.corpora.default.conversations import Asker, picture_turns, record
from parrot_sys.data.corpora.default.dialogues import DIALOGUE_TYPES, draw_dialogues, write_dialogues
from parrot_sys.data.corpora.default.initial_decoder import InitialDecoderConfig, write_initial_decoder
from parrot_sys.data.corpora.default.offered import ASSETS, MORE_LANGUAGES, OFFERED, language_file
from parrot_sys.data.corpora.default.phrases import wordings
from parrot_sys.data.corpora.default.pictures import training_picture
from parrot_sys.data.corpora.default.questions import draw_questions, encode_pictures, write_benchmark
from parrot_sys.data.corpora.default.text_corpus import text_conversations
from parrot_sys.data.corpora.default.train_tokenizer import train_tokenizer
from parrot_sys.data.languages import MMMB_LANGUAGES
from parrot_sys.data.templates import render_conversation
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.paths import NEW_FOLDER
from parrot_sys.staging import remove_leftovers, staged_directory

MANIFEST = "manifest.json"
_FORMAT = 4  # raise it when the same settings give other files
_MEANING_SIZE = 10  # least coordinates of a word vector beside one for each language
_MIN_VOCAB = 256 + 3  # bytes and special tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class DataBuildConfig:
    """Settings of the default data set. The same settings give the same files, byte for byte."""

    output: Annotated[Path, NEW_FOLDER]
    """Folder to make."""
    concepts: int = 120
    """Things that training pictures show."""
    held_out: int = 30
    """Further things with pictures in the benchmark's `concept` split only (their names are in the text corpus)."""
    languages: tuple[str, ...] = MMMB_LANGUAGES
    """Languages of conversations and benchmark; `parrot data languages` lists those that there are."""
    mix: str = ""
    """Relative amount of conversations with pictures per language, such as `en=1,zh=0.2`; 1 where not named."""
    image_size: int = 128
    """Side of the pictures in pixels."""
    variants: int = 6
    """Training pictures of each concept: as drawn, as line drawing, and both moved."""
    text_rounds: int = 18
    """Stage 0: questions about each name in each language."""
    text_turns: int = 4
    """Stage 0: questions in one conversation."""
    align_rounds: int = 2
    """Stage 1: conversations about each concept in each language."""
    instruct_rounds: int = 13
    """Stage 2: conversations about each concept in each language."""
    vocab_size: int = 6144
    """Most entries of the tokenizer, and rows of the decoder's embedding (those without an entry stay unused)."""
    decoder: InitialDecoderConfig = field(default_factory=InitialDecoderConfig)
    """Sizes of the decoder that stage 0 starts from."""
    seed: int = 0
    """Seed of everything that is drawn at random."""
    overwrite: bool = False
    """Replace an existing folder that was built with other settings."""

    def __post_init__(self) -> None:
        unknown = [language for language in self.languages if language not in OFFERED]
        if unknown or len(set(self.languages)) != len(self.languages) or not self.languages:
            raise ConfigError(
                f"languages must be distinct and among {', '.join(OFFERED)}, got {', '.join(self.languages)}"
            )
        if not 32 <= self.image_size <= 1024:
            raise ConfigError(f"image_size must be in [32, 1024], got {self.image_size}")
        for name in ("variants", "text_rounds", "text_turns", "align_rounds", "instruct_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.held_out and self.held_out < 4:
            raise ConfigError(f"held_out must be 0 or >= 4 (a question has four options), got {self.held_out}")
        if self.vocab_size < _MIN_VOCAB:
            raise ConfigError(f"vocab_size must be >= {_MIN_VOCAB} (bytes and special tokens), got {self.vocab_size}")
        if self.decoder.hidden_size < (least := _MEANING_SIZE + len(self.spoken)):
            raise ConfigError(
                f"decoder.hidden_size must be >= {least}: one for each of {len(self.spoken)} languages and "
                f"{_MEANING_SIZE} for meanings; got {self.decoder.hidden_size}"
            )
        self.weights()

    @property
    def spoken(self) -> tuple[str, ...]:
        """Languages of the decoder's first word vectors: the default ones, whatever the data, and these."""
        return tuple(dict.fromkeys((*MMMB_LANGUAGES, *self.languages)))

    def weights(self) -> dict[str, float]:
        """Language -> relative amount, from `mix`."""
        weights = dict.fromkeys(self.languages, 1.0)
        for part in filter(None, self.mix.replace(" ", "").split(",")):
            language, _, amount = part.partition("=")
            if language not in weights:
                raise ConfigError(
                    f"mix names the language {language!r}, want one of languages={', '.join(self.languages)}"
                )
            try:
                weights[language] = float(amount)
            except ValueError:
                raise ConfigError(f"mix must look like en=1,zh=0.2; got {part!r}") from None
            if not 0 <= weights[language] <= 1000:
                raise ConfigError(f"mix.{language} must be in [0, 1000], got {amount}")
        if not any(weights.values()):
            raise ConfigError("mix leaves no conversation in any language")
        return weights

    def fingerprint(self) -> str:
        """Hash of all settings that decide the files, and of the vendored assets."""
        settings = dataclasses.asdict(self) | {
            "output": None,
            "overwrite": None,
            "mix": self.weights(),
            "format": _FORMAT,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for path in sorted(p for p in ASSETS.iterdir() if p.suffix in (".gz", ".webp", ".yaml")):
            digest.update(path.read_bytes())
        for language in self.languages:
            if language in MORE_LANGUAGES:
                digest.update(language_file(language).read_bytes())
        return digest.hexdigest()


def build(config: DataBuildConfig) -> bool:
    """Make the data set; returns False when `config.output` holds it already.

    The folder appears under its name only when it is complete: an interrupted build leaves nothing that looks finished.

    Raises:
        DataError: the folder holds something else, or the package with the held-out pictures is missing.
        ConfigError: more concepts than there are.
    """
    output = config.output.absolute()
    remove_leftovers(output)
    if output.exists():
        if _built_with(output) == config.fingerprint():
            return False
        if not config.overwrite:
            raise DataError(
                f"{output} exists and was not built with these settings; "
                "fix: choose another --output or pass --overwrite"
            )
        if _built_with(output) is None and any(output.iterdir()):
            raise DataError(f"{output} is not a data set that this command made (no {MANIFEST}); it is left as it is")
    with staged_directory(output) as folder:
        _write_all(config, folder)
    return True


def _built_with(folder: Path) -> str | None:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["hash"]
    except (OSError, ValueError, KeyError):
        return None


def _write_all(config: DataBuildConfig, folder: Path) -> None:
    known, unseen = choose_concepts(config.concepts, config.held_out, config.seed, load_concepts(config.languages))
    questions = draw_questions(known, unseen, config.seed)
    steps = len(known) + len(config.languages) + 4
    with tqdm(total=steps, desc="building the data set", unit="step", leave=False) as bar:
        pictures = encode_pictures(questions, config.image_size)  # first: it fails early when the package is missing
        bar.update()
        (folder / "images").mkdir()
        for concept in known:
            for variant in range(config.variants + 1):
                name = _picture_name(concept, variant, config.variants)
                training_picture(concept, variant, config.image_size, config.seed).save(folder / name)
            bar.update()
        records = _records(config, known, unseen)
        for name, content in records.items():
            _write_records(folder / f"{name}.json", content)
        bar.update()
        for name in ("benchmark", "iit"):
            (folder / name).mkdir()
        dialogues = draw_dialogues(questions, config.seed)
        drawings = {question.concept.emoji: picture for question, picture in zip(questions, pictures, strict=True)}
        for language in config.languages:
            write_benchmark(folder / "benchmark", language, questions, pictures)
            write_dialogues(folder / "iit", language, config.languages, dialogues, drawings, config.seed)
            bar.update()
        vocabulary = train_tokenizer(_texts(records), config.vocab_size, folder / "tokenizer")
        bar.update()
        _write_decoder(config, [*known, *unseen], folder)
        bar.update()
    manifest = {
        "hash": config.fingerprint(),
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "overwrite")},
        "records": {name: _count_languages(content) for name, content in records.items()},
        "questions": {split: sum(q.split == split for q in questions) for split in ("style", "concept")},
        "dialogues": {kind: sum(dialogue.type == kind for dialogue in dialogues) for kind in DIALOGUE_TYPES},
        "pictures": len(known) * (config.variants + 1),
        "vocabulary": vocabulary,
        "concepts": {"train": [c.emoji for c in known], "held_out": [c.emoji for c in unseen]},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_decoder(config: DataBuildConfig, concepts: Sequence[Concept], folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    shutil.copytree(folder / "tokenizer", folder / "decoder")
    write_initial_decoder(
        folder / "decoder",
        config.decoder,
        concepts,
        {language: wordings(language) for language in config.spoken},
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        config.vocab_size,
        config.seed,
    )


def _records(
    config: DataBuildConfig, known: Sequence[Concept], unseen: Sequence[Concept]
) -> dict[str, list[dict[str, Any]]]:
    """Data set -> its records. The held-out concepts' names are in the text corpus alone."""
    named = sorted([*known, *unseen], key=lambda concept: concept.index)
    words = text_conversations(
        named, config.languages, rounds=config.text_rounds, turns=config.text_turns, seed=config.seed
    )
    words_again = text_conversations(
        known, config.languages, rounds=1, turns=1, seed=config.seed, stage="instruct-text"
    )
    return {
        "text": list(words),
        "align": list(_picture_conversations(config, known, "align")),
        "detail": list(_picture_conversations(config, known, "detail")),
        "instruct": [*_picture_conversations(config, known, "instruct"), *words_again],
        "validation": list(_validation(config, known)),
    }


def _picture_conversations(config: DataBuildConfig, known: Sequence[Concept], stage: str) -> Iterator[dict[str, Any]]:
    """Stage `align`: the open question; `detail`: the same with long answers; `instruct`: one to four questions of
    different kinds about a picture."""
    rounds = config.instruct_rounds if stage == "instruct" else config.align_rounds
    for language, weight in config.weights().items():
        for number in range(round(weight * rounds * len(known))):
            concept = known[number % len(known)]
            generator = random.Random(f"{config.seed}:{stage}:{language}:{number}")
            asker = Asker(language=language, pool=known, languages=config.languages, generator=generator)
            if stage == "align":
                turns = [asker.name(concept)]
            elif stage == "detail":
                turns = [asker.description(concept)]
            else:
                turns = picture_turns(asker, concept, count=generator.randint(1, 4))
            # languages start at different variants, so that every picture is asked about in several languages
            variant = (number // len(known) + config.languages.index(language)) % config.variants
            image = _picture_name(concept, variant, config.variants)
            yield record(f"{stage}-{language}-{number}", language, turns, image, concept.category)


def _validation(config: DataBuildConfig, known: Sequence[Concept]) -> Iterator[dict[str, Any]]:
    """One question of the benchmark's kind for every fifth concept in each language, about a picture kept for this."""
    for language in config.languages:
        generator = random.Random(f"{config.seed}:validation:{language}")
        asker = Asker(language=language, pool=known, languages=config.languages, generator=generator)
        for concept in known[::5]:
            image = _picture_name(concept, config.variants, config.variants)
            yield record(
                f"validation-{language}-{concept.key}", language, [asker.name_choice(concept)], image, concept.category
            )


def _picture_name(concept: Concept, variant: int, variants: int) -> str:
    """The variant after the last training one is the validation picture."""
    return f"images/{concept.key}_{'validation' if variant == variants else variant}.png"


def _write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _texts(records: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Texts that the decoder reads, without the special tokens: the words of the template become tokens as well."""
    for part in ("text", "align", "instruct"):
        for entry in records[part]:
            for segment in render_conversation(entry["conversations"]):
                yield segment.text.replace(IM_START, "").replace(IM_END, "").replace(IMAGE_TOKEN, "")


def _count_languages(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in records:
        counts[entry["lang"]] = counts.get(entry["lang"], 0) + 1
    return counts
