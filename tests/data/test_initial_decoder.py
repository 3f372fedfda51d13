"""The decoder that stage 0 starts from: word vectors that know translations, and a checkpoint that others can read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from parrot_sys.data.corpora.default.concepts import choose_concepts
from parrot_sys.data.corpora.default.initial_decoder import (
    InitialDecoderConfig,
    lexical_embeddings,
    write_initial_decoder,
)
from parrot_sys.data.corpora.default.phrases import wordings
from parrot_sys.data.corpora.default.train_tokenizer import train_tokenizer
from parrot_sys.data.languages import MMMB_LANGUAGES
from parrot_sys.errors import ConfigError
from tests.comparisons import differ

VOCAB = 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder")
    concepts, _ = choose_concepts(40, 4, 0)
    words = [text for c in concepts for name in c.names.values() for text in (name,) * 3]
    train_tokenizer(words, VOCAB, path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    config = InitialDecoderConfig(hidden_size=48, num_layers=2, num_attention_heads=4, ffn_hidden_size=64)
    spoken = {language: wordings(language) for language in MMMB_LANGUAGES}
    write_initial_decoder(path, config, concepts, spoken, lambda text: tokenizer(text).input_ids, VOCAB, seed=0)
    return path


def test_translations_are_closer_than_other_names(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    weight = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    concepts, _ = choose_concepts(40, 4, 0)

    def vectors(language: str) -> torch.Tensor:
        return F.normalize(
            torch.stack([weight[tokenizer(c.names[language]).input_ids].mean(0) for c in concepts]), dim=1
        )

    english = vectors("en")
    for language in MMMB_LANGUAGES:
        closeness = english @ vectors(language).T
        closer = closeness.diagonal()[:, None] > closeness  # names that share a word are close as well
        assert closer.float().sum() / (closer.numel() - len(concepts)) > 0.9, language


def test_vectors_tell_languages_apart(folder: Path) -> None:
    """A name is closer to another concept's name of its own language than to one of another language."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    weight = F.normalize(load_file(folder / "model.safetensors")["model.embed_tokens.weight"], dim=1)
    concepts, _ = choose_concepts(40, 4, 0)
    means = {
        language: torch.stack([weight[tokenizer(c.names[language]).input_ids].mean(0) for c in concepts]).mean(0)
        for language in MMMB_LANGUAGES
    }
    for language in MMMB_LANGUAGES:
        questions = weight[[i for text in wordings(language) for i in tokenizer(text).input_ids]].mean(0)
        closeness = {other: float(questions @ mean) for other, mean in means.items()}
        assert max(closeness, key=closeness.__getitem__) == language, closeness


def test_all_vectors_have_one_norm(folder: Path) -> None:
    weight = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert weight.shape == (VOCAB, 48)
    torch.testing.assert_close(weight.norm(dim=1), torch.full((VOCAB,), 0.4))


def test_seed_decides_the_weights() -> None:
    concepts, _ = choose_concepts(20, 4, 0)
    encode = {name: index for index, name in enumerate(sorted({n for c in concepts for n in c.names.values()}))}

    def make(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        no_wordings: dict[str, list[str]] = {language: [] for language in MMMB_LANGUAGES}
        return lexical_embeddings(concepts, no_wordings, lambda text: [encode.get(text, 0)], len(encode), 16, generator)

    torch.testing.assert_close(make(3), make(3), rtol=0, atol=0)
    assert differ(make(3), make(4))


def test_transformers_reads_it_and_heads_match_content(folder: Path) -> None:
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert model.config.tie_word_embeddings
    ids = torch.tensor([[5, 9, 14, 300, 7, 300]])
    attention = model(ids, output_attentions=True).attentions[0][0].mean(0)  # of the first block, over its heads
    # the second 300 looks at itself and at the first one more than at any other row
    assert set(attention[5].topk(2).indices.tolist()) == {3, 5}


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match=r"decoder\.hidden_size must be a multiple of .*=5 and at least 16, got 192"):
        InitialDecoderConfig(num_attention_heads=5)
