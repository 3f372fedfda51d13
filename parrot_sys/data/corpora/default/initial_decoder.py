"""The small decoder that stage 0 starts from: untrained, but its word vectors and attention already compare meanings.

From ordinary random weights, a decoder of this size spends minutes before it connects a word with its translations. Two
published starting points take that away:

* Word vectors by latent semantic analysis (Deerwester et al. 1990): the truncated SVD of how often each token occurs in
  the CLDR names and keywords of each concept, in all languages at once. Tokens of one meaning start close together. A
  part of its own says how often a token occurs in each language: without it, the names of one concept start as
  nearly the same vector, which the decoder has to pull apart first.
* Attention after "Mimetic initialization of self-attention layers" (Trockman and Kolter, arXiv 2305.09828): queries and
  keys start from one orthogonal matrix, values and output from a pair that are each other's inverse, so that a head
  begins by looking for similar content and passing it on.

It is written as a Hugging Face Qwen2 checkpoint; `checkpoint.load_from` reads it like any other bare Qwen2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from parrot_sys.data.corpora.default.concepts import Concept
from parrot_sys.errors import ConfigError
from parrot_sys.files import save_tensors

_NAME_WEIGHT = 3.0  # a name says more about its concept than one of its keywords
_EMBEDDING_NORM = 0.4
_MEANINGLESS = 0.5  # length of the random direction, beside a meaning's 1
_VALUE_SCALE = 0.5
_MIN_HIDDEN_SIZE = 16  # word vectors need some coordinates for meanings beside one for each language
_NOISE = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialDecoderConfig:
    """Sizes of the small decoder; those of the preset that trains it."""

    hidden_size: int = 192
    """H."""
    num_layers: int = 3
    """Blocks."""
    num_attention_heads: int = 4
    """Heads, each with keys and values of its own."""
    ffn_hidden_size: int = 512
    """Inner width of the SwiGLU."""
    max_position_embeddings: int = 1024
    """Longest sequence in rows."""
    rope_base: float = 10_000.0
    """Base of the rotary embedding."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.hidden_size < _MIN_HIDDEN_SIZE:
            raise ConfigError(
                f"decoder.hidden_size must be a multiple of decoder.num_attention_heads={self.num_attention_heads} "
                f"and at least {_MIN_HIDDEN_SIZE}, got {self.hidden_size}"
            )
        if not 0 < self.rope_base < math.inf:
            raise ConfigError(f"decoder.rope_base must be > 0 and finite, got {self.rope_base}")


def write_initial_decoder(
    output: Path,
    config: InitialDecoderConfig,
    concepts: Sequence[Concept],
    wordings: Mapping[str, Sequence[str]],
    encode: Callable[[str], Sequence[int]],
    vocab_size: int,
    seed: int,
) -> None:
    """Write config.json and model.safetensors into `output`, which holds the tokenizer.

    Args:
        output: existing folder.
        config: sizes.
        concepts: names and keywords that give the word vectors.
        wordings: language -> other texts in it.
        encode: text -> token ids.
        vocab_size: rows of the embedding, at least the entries of the tokenizer.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model.embed_tokens.weight": lexical_embeddings(
            concepts, wordings, encode, vocab_size, config.hidden_size, generator
        )
    }
    for layer in range(config.num_layers):
        tensors |= _layer(f"model.layers.{layer}.", config, generator)
    tensors["model.norm.weight"] = torch.ones(config.hidden_size)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(contiguous, output / "model.safetensors")
    (output / "config.json").write_text(json.dumps(_hf_config(config, vocab_size), indent=2) + "\n", encoding="utf-8")


def lexical_embeddings(
    concepts: Sequence[Concept],
    wordings: Mapping[str, Sequence[str]],
    encode: Callable[[str], Sequence[int]],
    vocab_size: int,
    hidden_size: int,
    generator: torch.Generator,
) -> Tensor:
    """[vocab_size, hidden_size] word vectors of equal norm, from what a token means and which languages it occurs in.

    A token that occurs in no name or keyword has a random direction in place of a meaning.
    """
    meanings = torch.zeros(vocab_size, len(concepts), dtype=torch.float64)
    spoken = torch.zeros(vocab_size, len(wordings), dtype=torch.float64)
    for column, language in enumerate(wordings):
        texts = [*wordings[language], *(text for c in concepts for text in (c.names[language], *c.keywords[language]))]
        ids = torch.tensor([token for text in texts for token in encode(text)])
        spoken[:, column] = torch.bincount(ids, minlength=vocab_size)
    for column, concept in enumerate(concepts):
        for language in wordings:
            meanings[list(encode(concept.names[language])), column] += _NAME_WEIGHT
            for keyword in concept.keywords[language]:
                meanings[list(encode(keyword)), column] += 1.0
    rank = min(hidden_size - len(wordings), len(concepts))
    vectors = torch.zeros(vocab_size, hidden_size, dtype=torch.float64)
    vectors[:, :rank] = _latent_semantics(meanings, rank)
    shares = spoken / spoken.sum(dim=1, keepdim=True)
    vectors[:, -len(wordings) :] = (shares - 1 / len(wordings)).nan_to_num()
    # spread over all coordinates, so that the heads share meaning and language
    vectors = vectors @ _orthogonal(hidden_size, generator).double()
    meaningless = meanings.sum(dim=1) == 0
    noise = torch.randn(int(meaningless.sum()), hidden_size, generator=generator, dtype=torch.float64)
    vectors[meaningless] += _MEANINGLESS * normalize(noise, dim=1)
    return (normalize(vectors, dim=1) * _EMBEDDING_NORM).float()


def _latent_semantics(counts: Tensor, rank: int) -> Tensor:
    """[tokens, rank] unit vectors (zero for tokens without a count) from counts [tokens, documents]."""
    documents = (counts > 0).sum(dim=1, keepdim=True).clamp(min=1)
    left, values, _ = torch.linalg.svd(counts.sqrt() * (counts.shape[1] / documents).log(), full_matrices=False)
    return normalize(left[:, :rank] * values[:rank], dim=1)


def _layer(prefix: str, config: InitialDecoderConfig, generator: torch.Generator) -> dict[str, Tensor]:
    size, inner = config.hidden_size, config.ffn_hidden_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * _NOISE

    match, carry = _orthogonal(size, generator), _orthogonal(size, generator)
    return {
        f"{prefix}input_layernorm.weight": torch.ones(size),
        f"{prefix}post_attention_layernorm.weight": torch.ones(size),
        f"{prefix}self_attn.q_proj.weight": match + normal(size, size),
        f"{prefix}self_attn.k_proj.weight": match + normal(size, size),
        f"{prefix}self_attn.v_proj.weight": _VALUE_SCALE * carry + normal(size, size),
        f"{prefix}self_attn.o_proj.weight": _VALUE_SCALE * carry.T + normal(size, size),
        **{f"{prefix}self_attn.{name}_proj.bias": torch.zeros(size) for name in "qkv"},
        f"{prefix}mlp.gate_proj.weight": normal(inner, size),
        f"{prefix}mlp.up_proj.weight": normal(inner, size),
        f"{prefix}mlp.down_proj.weight": normal(size, inner),
    }


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


def _hf_config(config: InitialDecoderConfig, vocab_size: int) -> dict[str, Any]:
    sizes = asdict(config)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["ffn_hidden_size"],
        "max_position_embeddings": sizes["max_position_embeddings"],
        "num_attention_heads": sizes["num_attention_heads"],
        "num_hidden_layers": sizes["num_layers"],
        "num_key_value_heads": sizes["num_attention_heads"],
        "rms_norm_eps": 1e-6,
        "rope_theta": sizes["rope_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }
