"""No code outside their own folders names a system, a vision tower or a decoder family: it would need editing for the
next one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from parrot_sys.models.llm import FAMILIES
from parrot_sys.systems.registry import SYSTEMS
from parrot_sys.towers import TOWERS

ROOT = Path(__file__).resolve().parents[2]
HOMES = ("parrot_sys/systems/", "parrot_sys/towers/", "parrot_sys/models/llm/")
"""Folders in which each has a file or folder of its own."""
EXCEPTIONS: dict[str, str] = {
    "parrot_sys/data/corpora/default/initial_decoder.py: qwen2": "the kind of decoder that the demo starts from",
    "parrot_sys/data/corpora/public/instructions.py: llava": "a data set of that name",
    "parrot_sys/data/images.py: clip": "the mode of NumPy's take that needs no buffer",
    "parrot_sys/data/processor.py: multimodal_gpt": "its released files state no template, and may lack a tokenizer",
    "parrot_sys/inference/convert.py: flamingo": "an option for one of the files that MultiModal-GPT was released as",
    "parrot_sys/inference/convert.py: multimodal_gpt": "puts the files together that it was released as",
    "parrot_sys/megatron/embed/text_guided.py: llava": "Megatron's class LLaVAModel",
}
"""`file: name` -> reason why it is named there."""

# Parrot's own name is that of the package: of it only the types of released files are looked for.
_ANYWHERE = [name for system in SYSTEMS.values() for name in (system.name, system.section or "") if name]
_ANYWHERE = [name for name in dict.fromkeys(_ANYWHERE) if name != "parrot"]
_WHOLE = [*TOWERS, *FAMILIES, *(kind for system in SYSTEMS.values() for kind in system.model_types)]
"""Short words that mean other things inside of longer names (`clip_grad`): looked for as whole strings and names."""


def code(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every name and of every string that is no docstring."""
    tree = ast.parse(source)
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        for field in ("id", "attr", "arg", "name", "module"):
            if isinstance(text := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), text


def named(text: str) -> str | None:
    """System, tower or family that a name or string is or holds."""
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text).lower().replace("-", "_")
    for name in _ANYWHERE:
        if re.search(rf"(?<![a-z]){name}", plain):
            return name
    return plain if plain in _WHOLE else None


def test_the_check_sees_what_it_looks_for() -> None:
    found = [
        named(text) for _, text in code('from parrot_sys.systems.wings import x\nif m.flamingo == "clip": "qwen2"')
    ]
    assert {name for name in found if name} == {"wings", "flamingo", "clip"}
    assert [named(text) for text in ("clip_grad", "MultimodalGptFiles", "parrot_wings_x", "parrot_sys", "parrot")] == [
        None,
        "multimodal_gpt",
        "wings",
        None,
        None,
    ]


def test_systems_towers_and_families_are_named_at_home_alone() -> None:
    found = set()
    for path in sorted((ROOT / "parrot_sys").rglob("*.py")):
        file = str(path.relative_to(ROOT))
        if not file.startswith(HOMES):
            found |= {f"{file}: {name}" for _, text in code(path.read_text("utf-8")) if (name := named(text))}
    assert found == set(EXCEPTIONS), "ask the registries, or say in EXCEPTIONS why not"
