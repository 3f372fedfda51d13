"""Small tokenizers of the kinds that models have, trained where they are asked for."""

from __future__ import annotations

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "What is in the picture? It is a cat, a dog or two.",
    "Que animal \u00e9? Um gato.",
    "\u4ec0\u4e48\u52a8\u7269\uff1f",
    "user system assistant",
] * 3
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>")
LLAMA = ("<unk>", "<s>", "</s>")
KINDS = ("byte_level", "added", "stripping", "llama3", "llama", "metaspace", "unigram", "wordpiece")


@functools.cache
def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the tokens of ChatML; all but those of its kind's own are special."""
    if kind in ("byte_level", "added", "stripping", "llama3"):
        return _byte_level(kind)
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        special = ["[UNK]", "[CLS]", "[SEP]", *CHATML]
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
        backend.train_from_iterator(TEXTS, trainer)
        return _fast(backend, eos_token="[SEP]", unk_token="[UNK]")
    return _sentencepiece(kind)


def _byte_level(kind: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(LLAMA3) if kind == "llama3" else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    strips = kind == "stripping"
    backend.add_special_tokens([AddedToken(token, lstrip=strips, rstrip=strips) for token in CHATML])
    if kind == "added":  # special or not, one with a word's letters at its edges, and two that are words
        backend.add_tokens(["<tool_call>", "[INST]", "<image>", "say:", AddedToken("<think>", normalized=True)])
        backend.add_tokens(["kedi", "  "])
    return _fast(backend, eos_token="<|im_end|>")


def _sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    special = [*LLAMA, *CHATML]
    if kind == "unigram":  # (special tokens are pieces like any other one there)
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.train_from_iterator(
            TEXTS,
            trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False),
        )
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if kind == "llama":
            steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            backend.normalizer = normalizers.Sequence(steps)
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        backend.train_from_iterator(TEXTS, trainer)
    if kind == "metaspace":  # bytes that no name in a text can mean, as in LLaMA's own file
        spec = json.loads(backend.to_str())
        spec["added_tokens"] = [entry for entry in spec["added_tokens"] if not entry["content"].startswith("<0x")]
        backend = Tokenizer.from_str(json.dumps(spec))
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    return _fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _fast(backend: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", **roles)
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer
