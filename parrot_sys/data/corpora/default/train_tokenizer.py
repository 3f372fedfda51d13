"""A small byte-level BPE for the default data set, saved as a Qwen2 tokenizer of Hugging Face.

It splits text as Qwen2 does: AutoTokenizer gives every checkpoint of that type Qwen2's own class, which reads the
vocabulary and the merges and splits by its own rule, whatever tokenizer.json says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
_SPECIAL = (END_OF_TEXT, TURN_START, TURN_END)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's rule (transformers, models/qwen2/tokenization_qwen2.py): each digit is a token of its own."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: Path, *, model_max_length: int = 2048) -> int:
    """Learn at most `vocab_size` entries (three special ones included) from `texts`; write the files to `output`.

    Returns:
        Number of entries. The special ones come last, as in Qwen2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_SPECIAL),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(_SPECIAL))
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    tokenizer.model.save(str(output))  # vocab.json and merges.txt, which the slow tokenizer reads
    size = tokenizer.get_vocab_size()
    first_special = size - len(_SPECIAL)
    _write(output / "added_tokens.json", {token: first_special + i for i, token in enumerate(_SPECIAL)})
    roles = {"eos_token": TURN_END, "pad_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    extra = {"additional_special_tokens": [TURN_START, TURN_END]}
    _write(output / "special_tokens_map.json", {**roles, **extra})
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    _write(
        output / "tokenizer_config.json",
        {
            "added_tokens_decoder": {str(first_special + i): {"content": t, **flags} for i, t in enumerate(_SPECIAL)},
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": model_max_length,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            **roles,
            **extra,
        },
    )
    return size


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
