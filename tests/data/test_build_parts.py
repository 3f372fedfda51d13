"""Concepts, phrases, pictures, prompts, tokenizer and the maintainers' command behind the default data set."""

from __future__ import annotations

import gzip
import json
import random
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from PIL import Image

from parrot_sys.data.corpora.default import pictures
from parrot_sys.data.corpora.default.cldr import Cldr
from parrot_sys.data.corpora.default.concepts import (
    ATLAS_FILE,
    CONCEPTS_FILE,
    L2_CATEGORY,
    choose_concepts,
    load_concepts,
)
from parrot_sys.data.corpora.default.conversations import (
    PICTURE_TURNS,
    TEXT_TURNS,
    Asker,
    draw_distractors,
    picture_turns,
)
from parrot_sys.data.corpora.default.phrases import load_phrases
from parrot_sys.data.corpora.default.pictures import openmoji_picture, training_picture
from parrot_sys.data.corpora.default.train_tokenizer import train_tokenizer
from parrot_sys.data.corpora.default.vendor import VendorConfig, vendor
from parrot_sys.data.languages import MMMB_LANGUAGES
from parrot_sys.data.main import main
from parrot_sys.data.mcq_prompt import build_mcq_prompt
from parrot_sys.errors import DataError


def test_names_are_distinct_in_every_language() -> None:
    concepts = load_concepts()
    assert len(concepts) == 1114
    for language in MMMB_LANGUAGES:
        assert len({concept.names[language].casefold() for concept in concepts}) == len(concepts)
    assert {concept.category for concept in concepts} == set(L2_CATEGORY)
    assert len(L2_CATEGORY) == 15


def test_concepts_are_spread_over_the_categories() -> None:
    train, held_out = choose_concepts(300, 45, 0)
    assert len({c.key for c in train} | {c.key for c in held_out}) == 345
    per_category = [sum(c.category == category for c in train) for category in L2_CATEGORY]
    assert min(per_category) >= 15
    assert max(per_category) <= 25
    few, unseen = choose_concepts(120, 30, 0)  # the sizes of the demo
    for part, each in ((few, 8), (unseen, 2)):
        assert [sum(c.category == category for c in part) for category in L2_CATEGORY] == [each] * len(L2_CATEGORY)
    assert choose_concepts(300, 45, 0) == (train, held_out)
    assert choose_concepts(300, 45, 1) != (train, held_out)


def test_phrases_say_the_same_in_every_language() -> None:
    def fields(value: Any) -> Any:
        if isinstance(value, str):
            return sorted(name for _, name, _, _ in string.Formatter().parse(value) if name)
        return [fields(v) for v in value] if isinstance(value, list) else {key: fields(v) for key, v in value.items()}

    phrases = load_phrases()
    assert set(phrases) == set(MMMB_LANGUAGES)
    for language in MMMB_LANGUAGES:
        assert fields(phrases[language]) == fields(phrases["en"])
        assert set(phrases[language]["categories"]) == set(L2_CATEGORY)
        assert len(set(phrases[language]["categories"].values())) == 15
        assert set(phrases[language]["languages"]) == set(MMMB_LANGUAGES)


def test_prompt_is_the_wrappers() -> None:
    options = {"A": "cat", "B": "dog"}
    assert build_mcq_prompt("What is it?", options, "en", hint="Look.") == (
        "Look.\nWhat is it?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    assert build_mcq_prompt("Q", options, "pt") == (
        "Q\nA. cat\nB. dog\nResponda diretamente com a letra da opção das escolhas dadas."
    )
    assert build_mcq_prompt("Q", {}, "tr") == "Q\nAnswer the question using a single word or phrase."
    assert build_mcq_prompt("问", {}, "zh") == "问\n请用单个词或短语回答问题。"


@pytest.mark.parametrize("language", MMMB_LANGUAGES)
@pytest.mark.parametrize("kind", [*PICTURE_TURNS, *TEXT_TURNS])
def test_every_kind_asks_and_answers(kind: str, language: str) -> None:
    pool = choose_concepts(40, 0, 0)[0]
    asker = Asker(language=language, pool=pool, languages=MMMB_LANGUAGES, generator=random.Random(0))
    make = (PICTURE_TURNS | TEXT_TURNS)[kind][1]
    for concept in pool:
        if kind == "keywords" and not concept.keywords[language]:
            assert all(question != asker.phrases[kind] for question, _ in picture_turns(asker, concept, count=4))
            continue
        question, answer = make(asker, concept)
        assert "{" not in question
        assert answer.strip()
        options = re.findall(r"^[A-D]\. (.*)$", question, re.MULTILINE)
        assert len(set(options)) == len(options)
        assert answer in options or not options


def test_first_distractor_has_the_concepts_category() -> None:
    pool = choose_concepts(60, 0, 0)[0]
    for concept in pool:
        drawn = draw_distractors(concept, pool, random.Random(concept.key))
        assert drawn[0].category == concept.category
        assert len({c.key for c in [concept, *drawn]}) == 4


def test_variants_differ_and_repeat_exactly() -> None:
    concept = next(c for c in load_concepts() if c.names["en"] == "red apple")
    images = [np.asarray(training_picture(concept, variant, 128, 0), dtype=np.int16) for variant in range(5)]
    for i, image in enumerate(images):
        assert image.shape == (128, 128, 3)
        assert np.array_equal(image, np.asarray(training_picture(concept, i, 128, 0)))
        assert all(np.abs(image - other).mean() > 2 for other in images[:i])
    black = [(image.max(axis=2) < 10).mean() for image in images]
    assert min(black[1], black[2]) > 0.02 > 0.005 > max(black[0], black[3])  # contours in the line drawings alone


def test_openmoji_shows_the_concept_in_another_style() -> None:
    concept = next(c for c in load_concepts() if c.names["en"] == "red apple")
    image = np.asarray(openmoji_picture(concept, 64), dtype=np.int16)
    assert image.shape == (64, 64, 3)
    assert (image[0] == 255).all()  # white paper
    middle = image[24:40, 24:40].reshape(-1, 3).mean(0)
    assert middle[0] > middle[1] + 50


def test_tokenizer_loads_from_its_folder_and_round_trips(tmp_path: Path) -> None:
    texts = [f"{phrase}\n" for block in load_phrases().values() for phrase in block["categories"].values()] * 3
    size = train_tokenizer(texts, 500, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert size == len(tokenizer) == 500
    for text in ("fruit and vegetables", "水果和蔬菜", "emoções ü ß", "فواكه وخضروات", "🦜 new\n\n text"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer(text).input_ids == plain.encode(text, add_special_tokens=False).ids  # class and file agree
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [497, 498, 499]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer("<|im_start|>user\n").input_ids[0] == 498
    assert len(tokenizer("fruit and vegetables").input_ids) < len("fruit and vegetables")  # merges were learned


def write_annotations(folder: Path, language: str, entries: dict[str, Any]) -> None:
    path = folder / "annotations" / language / "annotations.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"annotations": {"annotations": entries}}), encoding="utf-8")


def write_cldr(folder: Path) -> None:
    """The parts of CLDR's packages beside annotations, with German as the only language that has everything."""
    labels = (
        "smiley",
        "person",
        "animal",
        "plant",
        "weather",
        "food_drink",
        "place",
        "travel",
        "activities",
        "objects",
    )
    names = {"de": "German", "zh": "Chinese", "zh-Hant": "Traditional Chinese", "qqq": "Long", "pro": "Old"}
    scripts = {"Latn": "Latin", "Hans": "Simplified", "Hans-alt-stand-alone": "Simplified Han", "Hant": "Han"}
    tags = {
        "de": "de-Latn-DE",
        "zh": "zh-Hans-CN",
        "zh-Hant": "zh-Hant-TW",
        "zh-TW": "zh-Hant-TW",
        "zh-SG": "zh-Hans-SG",
    }
    lists = {"start": "{0}, {1}", "middle": "{0}, {1}", "end": "{0} oder {1}", "2": "{0} oder {1}"}
    display = {
        "codePatterns": {"language": "Sprache: {0}"},
        "localeDisplayPattern": {"localeKeyTypePattern": "{0}: {1}", "localeSeparator": "{0}, {1}"},
    }
    aliases = {
        "deu": {"_reason": "overlong", "_replacement": "de"},
        "ger": {"_reason": "bibliographic", "_replacement": "de"},
        "hbs": {"_reason": "overlong", "_replacement": "sr-Latn"},
        "cmn": {"_reason": "macrolanguage", "_replacement": "zh"},
    }
    files = {
        "supplemental/aliases.json": {"supplemental": {"metadata": {"alias": {"languageAlias": aliases}}}},
        "coverageLevels.json": {"coverageLevels": {"de": "modern", "zh-Hant": "modern"}},
        "supplemental/likelySubtags.json": {"supplemental": {"likelySubtags": tags}},
        "main/en/languages.json": {"main": {"en": {"localeDisplayNames": {"languages": names}}}},
        "main/en/scripts.json": {"main": {"en": {"localeDisplayNames": {"scripts": scripts}}}},
    }
    german = {
        "languages": {"localeDisplayNames": {"languages": {"de": "Deutsch"}}},
        "localeDisplayNames": {"localeDisplayNames": display},
        "posix": {"posix": {"messages": {"yesstr": "ja:j", "nostr": "nein:n"}}},
        "characterLabels": {"characterLabels": {label: label.upper() for label in labels}},
        "characters": {"characters": {"moreInformation": "?"}},
        "listPatterns": {"listPatterns": {"listPattern-type-or": lists}},
    }
    files |= {f"main/de/{name}.json": {"main": {"de": content}} for name, content in german.items()}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_vendor_keeps_what_has_distinct_names(tmp_path: Path) -> None:
    names = {"😀": "face", "🐱": "cat", "🐈": "Cat", "🐶": "dog", "🏁": "flag", "🕐": "one"}
    for language in (*MMMB_LANGUAGES, "de"):
        entries = {
            emoji: {"tts": [f"{name} {language}"], "default": [f"{name} {language}", *"wxyz"]}
            for emoji, name in names.items()
        }
        if language == "tr":
            del entries["🐶"]
        write_annotations(tmp_path, language, entries)
    write_cldr(tmp_path)
    lines = ["# group: X", "# subgroup: face-smiling", "1F600 ; fully-qualified # x", "# subgroup: animal-mammal"]
    lines += [f"{ord(emoji):X} ; fully-qualified # x" for emoji in "🐱🐈🐶"]
    lines += ["1F431 200D 1F5E8 ; fully-qualified # sequence", "# subgroup: flag", "1F3C1 ; fully-qualified # x"]
    lines += ["# subgroup: time", "1F550 ; fully-qualified # clock face"]
    (tmp_path / "emoji-test.txt").write_text("\n".join(lines), encoding="utf-8")
    font = Path(pictures._openmoji_font().path)
    config = VendorConfig(
        cldr=tmp_path,
        emoji_test=tmp_path / "emoji-test.txt",
        noto_font=font,
        output=tmp_path / "assets",
        languages_file=tmp_path / "languages.json",
        languages=("de",),
    )
    assert vendor(config) == 2
    made = json.loads(gzip.decompress((tmp_path / "assets" / CONCEPTS_FILE).read_bytes()))["concepts"]
    assert [(c["emoji"], c["category"]) for c in made] == [("😀", "faces"), ("🐱", "mammals")]
    assert made[1]["keywords"]["pt"] == [*"wxyz"]
    assert Image.open(tmp_path / "assets" / ATLAS_FILE).size == (32 * 64, 64)
    german = json.loads(gzip.decompress((tmp_path / "assets" / "languages" / "de.json.gz").read_bytes()))
    assert german["names"] == ["face de", "cat de"]
    assert german["keywords"] == [[*"wxy"], [*"wxy"]]
    assert (german["cldr"]["own"], german["cldr"]["yes"], german["cldr"]["label"]) == ("Deutsch", "ja", "Sprache: {0}")
    facts = json.loads((tmp_path / "languages.json").read_text(encoding="utf-8"))
    assert facts["aliases"] == {"deu": "de", "ger": "de"}
    assert facts["names"] == {"de": "German", "zh": "Chinese", "zh-Hant": "Traditional Chinese"}
    assert facts["scripts"] == {"de": "Latn", "zh": "Hans", "zh-Hant": "Hant", "zh-TW": "Hant"}
    assert facts["script_names"] == {"Hans": "Simplified Han", "Hant": "Han", "Latn": "Latin"}
    assert facts["or"]["de"]["list"]["2"] == "{0} oder {1}"
    write_annotations(tmp_path, "de", {emoji: {"tts": ["same"]} for emoji in names})
    with pytest.raises(DataError, match="de has no name of its own for 🐱, got 'same'"):
        vendor(config)


def test_vendor_takes_no_word_from_another_language(tmp_path: Path) -> None:
    write_cldr(tmp_path)
    posix = tmp_path / "main" / "de" / "posix.json"
    posix.write_text(posix.read_text().replace("ja:j", "yes:y"))
    with pytest.raises(DataError, match="CLDR has no 'yes' of its own for the language de"):
        Cldr(tmp_path).phrases("de")


def test_vendor_names_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="annotations does not exist"):
        vendor(VendorConfig(cldr=tmp_path))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--concepts 6 --held-out 0 --languages en zh --image-size 32 --variants 1 --text-rounds 1 --align-rounds 1"
    arguments = [
        "build",
        "--output",
        str(tmp_path / "set"),
        *flags.split(),
        "--instruct-rounds",
        "1",
        "--vocab-size",
        "400",
    ]
    assert main(arguments) == 0
    assert (
        "built; records: text 4, align 12, detail 12, instruct 24, validation 4; pictures: 12"
        in capsys.readouterr().out
    )
    assert main(arguments) == 0
    assert "up to date" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert main(["rebuild"]) == 2
