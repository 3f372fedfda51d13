"""A tiny checkpoint of each system, with a tokenizer."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from parrot_sys.inference.convert import ConvertConfig, convert
from tests.megatron.tiled_models import write_tiled_model
from tests.models.flamingo_reference import ReleasedMultimodalGpt, Shape

FIXTURES = Path(__file__).parents[1] / "fixtures"


def flamingo_parts(folder: Path) -> dict[str, Path]:
    """Released files of a small MultiModal-GPT whose LLaMA has a tokenizer of 40 words, as many as its embedding has
    rows."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(37))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    parts = ReleasedMultimodalGpt(Shape(vocab=40)).write(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(parts["llm"])
    return parts


def write_system(system: str, folder: Path) -> Path:
    """The checkpoint of `parrot`, `wings`, `multimodal_gpt` or `llava` (with tiles); the last two are written.

    Returns:
        Its folder.
    """
    if system == "llava":
        return write_tiled_model(folder / "model")
    if system == "multimodal_gpt":
        parts = flamingo_parts(folder / "released")
        convert(ConvertConfig(source_format="multimodal_gpt", output=folder / "model", **parts))
        return folder / "model"
    return FIXTURES / f"{system}_tiny" / "model"
