"""MultiModal-GPT's released files -> one directory that loads, in released names (open-mmlab/Multimodal-GPT, 9c73e47).

It was released as four things: a LLaMA directory, OpenFlamingo's resampler and gated blocks (`.pt`), the LoRA weights
and settings of its training (`.pt`), and OpenAI's CLIP ViT-L/14. No tensor is changed, but that the embedding gets rows
for the tokens that OpenFlamingo added.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from parrot_sys.errors import CheckpointError
from parrot_sys.files import Fields, errors_named, read_json
from parrot_sys.models.finite import NonFinite
from parrot_sys.models.llm import LLMConfig, llm_config_from_hf
from parrot_sys.models.lora_maps import is_lora
from parrot_sys.models.tensor_files import TensorFiles, load_pickle, new_directory, write_tensors
from parrot_sys.models.tensor_map import check_tensors
from parrot_sys.modules.gated_cross_attention import GatedCrossAttentionConfig
from parrot_sys.modules.lora import LoRAConfig, Target
from parrot_sys.modules.perceiver import ResamplerConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.hf_config import CONFIG, EXPORTED_TOWER, config_to_hf
from parrot_sys.systems.maps import parrot_maps
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig
from parrot_sys.systems.multimodal_gpt.maps import BLOCKS_KEY, LORA_KEY, RESAMPLER_KEY
from parrot_sys.towers import vision_config_from_hf

logger = logging.getLogger(__name__)

ADDED_TOKENS = ("<|endofchunk|>", "<image>")
"""Tokens that OpenFlamingo puts after LLaMA's, in this order."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HEAD_DIM = 64  # fixed in the released code, and not to be told from the weights
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")

Read = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class MultimodalGptFiles:
    """Paths of the released parts."""

    llm: Path
    """LLaMA in Hugging Face layout."""
    flamingo: Path
    """OpenFlamingo's `.pt`."""
    lora: Path | None
    """The `.pt` of MultiModal-GPT's training; None for OpenFlamingo alone."""
    vision: Path
    """CLIP in Hugging Face layout."""


def assemble(
    files: MultimodalGptFiles,
    output: Path,
    *,
    num_tokens: int | None = None,
    image_token_id: int | None = None,
    vocab_multiple: int = 1,
    save_tokenizer: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    allow_non_finite: bool = False,
) -> ParrotConfig:
    """Write the parts as one directory, which appears only when everything is in it.

    Args:
        files: the parts.
        output: to be created.
        num_tokens: tokens of the tokenizer with the added ones; None: as many as the embedding has rows.
        image_token_id: id of `<image>`; None: the second of the tokens after LLaMA's own, as OpenFlamingo adds them
            (`<|endofchunk|>`, `<image>`, `<PAD>`), or the last one of an embedding that holds them already.
        vocab_multiple: the embedding gets rows up to a multiple of this number, so that it can be cut over ranks.
        save_tokenizer: writes the tokenizer with the added tokens into a directory.
        overwrite: replace an existing directory.
        allow_non_finite: NaN and infinite weights are a warning, not an error.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit the others; lists tensors by name.
        ConfigError: LLaMA or CLIP are of a kind that the model here cannot be.
    """
    hf = read_json(files.llm / CONFIG)
    llm = _llm_config(Fields(hf, files.llm / CONFIG))
    flamingo_tensors = _flamingo_tensors(load_pickle(files.flamingo), files.flamingo)
    with errors_named(files.flamingo, what="is no OpenFlamingo checkpoint"):
        flamingo = _flamingo_config(flamingo_tensors, files.flamingo)
    lora, lora_tensors = (None, {}) if files.lora is None else _read_lora(files.lora)
    with TensorFiles(files.llm) as llm_tensors:
        sources, tokens = _llm_sources(llm_tensors, flamingo_tensors, num_tokens, vocab_multiple)
        if image_token_id is None:
            image_token_id = _usual_image_token(files.llm, llm_tensors.shape(_EMBEDDING)[0], tokens)
        llm = replace(llm, vocab_size=sources[_EMBEDDING][0][0])
        config = _config(files, llm, lora, replace(flamingo, image_token_id=image_token_id))
        for tensors in (flamingo_tensors, lora_tensors):
            sources |= {key: (tuple(tensor.shape), partial(_itself, tensor)) for key, tensor in tensors.items()}
        maps = parrot_maps(config, with_vision_tower=False)
        if config.llm.tie_word_embeddings:
            sources.pop(_HEAD, None)
        where = ", ".join(str(path) for path in (files.llm, files.flamingo, files.lora) if path)
        check_tensors(maps, {key: shape for key, (shape, _) in sources.items()}, where)
        with new_directory(output, overwrite=overwrite) as target:
            _copy_files(files.llm, target, weights=False)
            _copy_files(files.vision, target / EXPORTED_TOWER, weights=True)
            if save_tokenizer is not None:
                save_tokenizer(target)
            original = {**hf, "mm_vision_tower": EXPORTED_TOWER}
            text = json.dumps(config_to_hf(config, original, target), indent=2, ensure_ascii=False)
            (target / "config.json").write_text(text + "\n", encoding="utf-8")
            found = NonFinite()
            write_tensors(_looked_at(sources, found), target)
            found.refuse(where, allow=allow_non_finite)
    return config


def _usual_image_token(llm: Path, own: int, tokens: int) -> int:
    """Id of `<image>` among so many tokens, of which LLaMA brings its `own`."""
    token = min(own + 1, tokens - 1)
    logger.warning(
        "%s holds no tokenizer: <image> is taken to be token %d of %d, of which LLaMA brings %d; say "
        "--image-token-id if it is another",
        llm,
        token,
        tokens,
        own,
    )
    return token


def _config(
    files: MultimodalGptFiles, llm: LLMConfig, lora: LoRAConfig | None, flamingo: FlamingoConfig
) -> ParrotConfig:
    vision = vision_config_from_hf(read_json(files.vision / CONFIG), file=files.vision / CONFIG)
    return ParrotConfig(
        vision=replace(vision, select_layer=-1, select_feature="patch"),
        moe=TextGuidedMoEConfig(num_experts=0),
        llm=llm,
        lora=lora,
        template="instruction",
        max_seq_len=min(ParrotConfig().max_seq_len, llm.max_position_embeddings),
        flamingo=flamingo,
    )


def _looked_at(sources: Mapping[str, tuple[tuple[int, ...], Read]], found: NonFinite) -> Iterator[tuple[str, Tensor]]:
    for key, (_, read) in sources.items():
        tensor = read()
        found.look(key, tensor)
        yield key, tensor


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _llm_config(hf: Fields) -> LLMConfig:
    if hf.get("model_type", str) != "llama":
        raise CheckpointError(f"{hf.file}: model_type must be 'llama', got {hf.get('model_type', str)!r}")
    return llm_config_from_hf(hf)


def _state_dict(values: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without the prefix of a data-parallel wrapper."""
    for name in ("model_state_dict", "state_dict"):
        if isinstance(values.get(name), dict):
            values = values[name]
    tensors = {key.removeprefix("module."): value for key, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; it holds {', '.join(map(str, values)) or 'nothing'}")
    return tensors


def _flamingo_tensors(values: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Released name -> tensor; the embedding of the decoder keeps its key."""
    wrapped = re.compile(r"^lang_encoder\.model\.layers\.(\d+)\.gated_cross_attn_layer\.")
    tensors = {}
    for key, tensor in _state_dict(values, path).items():
        # A saved model names what it uses in several places several times, and may hold its frozen parts.
        if key.startswith(("vision_encoder.", "lang_encoder.old_decoder_blocks.")) or ".decoder_layer." in key:
            continue
        tensors[wrapped.sub(rf"{BLOCKS_KEY}\1.", key)] = tensor
    return tensors


def _flamingo_config(tensors: Mapping[str, Tensor], path: Path) -> FlamingoConfig:
    """Reads the configuration from shapes and names.

    Raises:
        CheckpointError: tensors are missing, or the gated blocks are at irregular distances.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in tensors:
            raise CheckpointError(f"{path} is no OpenFlamingo checkpoint: it has no {key}")
        return tuple(tensors[key].shape)

    numbers = sorted({int(key.removeprefix(BLOCKS_KEY).split(".")[0]) for key in tensors if key.startswith(BLOCKS_KEY)})
    every = numbers[0] + 1 if numbers else 0
    if not numbers or numbers != [every * (i + 1) - 1 for i in range(len(numbers))]:
        raise CheckpointError(f"{path}: gated blocks must be before every n-th layer, got those of {numbers}")
    depth = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith(f"{RESAMPLER_KEY}layers."))
    latents, width = shape(f"{RESAMPLER_KEY}latents")
    block = f"{BLOCKS_KEY}{numbers[0]}"
    inner, hidden = shape(f"{block}.attn.to_q.weight")
    return FlamingoConfig(
        resampler=ResamplerConfig(
            num_latents=latents,
            num_layers=depth,
            num_attention_heads=shape(f"{RESAMPLER_KEY}layers.0.0.to_q.weight")[0] // _HEAD_DIM,
            head_dim=_HEAD_DIM,
            ffn_multiplier=shape(f"{RESAMPLER_KEY}layers.0.1.1.weight")[0] // width,
        ),
        cross_attention=GatedCrossAttentionConfig(
            num_attention_heads=inner // _HEAD_DIM,
            head_dim=_HEAD_DIM,
            ffn_multiplier=shape(f"{block}.ff.1.weight")[0] // hidden,
        ),
        every_n_layers=every,
        media_rule="next",
        image_token_id=0,
    )


def _llm_sources(
    files: TensorFiles, flamingo: dict[str, Tensor], num_tokens: int | None, multiple: int
) -> tuple[dict[str, tuple[tuple[int, ...], Read]], int]:
    """LLaMA's tensors, shape and how to read each, and the number of tokens.

    Takes the trained embedding, if there is one, out of `flamingo`. Rows that are nowhere get the mean of the
    others: in the LM head that is the mean of all logits, which never is the largest.
    """
    sources: dict[str, tuple[tuple[int, ...], Read]] = {
        key: (files.shape(key), partial(files.tensor, key))
        for key in files.names()
        if not key.endswith(".rotary_emb.inv_freq")
    }
    for key, name in ((_EMBEDDING, "lang_encoder.model.embed_tokens.weight"), (_HEAD, "lang_encoder.lm_head.weight")):
        if (trained := flamingo.pop(name, None)) is not None:
            sources[key] = tuple(trained.shape), partial(_itself, trained)
    if _EMBEDDING not in sources:
        raise CheckpointError(f"{files.directory} holds no {_EMBEDDING}; it is no LLaMA in Hugging Face layout")
    tokens = max(num_tokens or 0, *(sources[key][0][0] for key in (_EMBEDDING, _HEAD) if key in sources))
    rows = -(-tokens // multiple) * multiple
    for key in (_EMBEDDING, _HEAD):
        if key in sources and (held := sources[key][0][0]) < rows:
            if held < tokens:
                logger.warning("%s has %d rows for %d tokens: the others get the mean of all rows", key, held, tokens)
            shape, read = sources[key]
            sources[key] = (rows, *shape[1:]), partial(_with_mean_rows, read, rows - held)
    return sources, tokens


def _with_mean_rows(read: Read, count: int) -> Tensor:
    rows = read()
    mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat((rows, mean.expand(count, -1)))


def _read_lora(path: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Settings and updates of a training checkpoint of the released code."""
    values = load_pickle(path)
    saved = _state_dict(values, path)
    tensors = dict(_named_once(saved))
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key and tensor.dim() == 2}
    if len(ranks) != 1:
        raise CheckpointError(f"{path}: the updates must have one rank, got {sorted(ranks) or 'no updates'}")
    settings = Fields(values, path).below("tuning_config")
    if "lora_alpha" not in settings:
        raise CheckpointError(
            f"{path} holds no tuning_config with lora_alpha, so the scale of its updates is unknown: add it, as "
            "{'lora_alpha': 16} for the released weights"
        )
    present = {target for target in get_args(Target) if any(f".{target}.lora_A." in key for key in tensors)}
    config = LoRAConfig(
        rank=ranks.pop(),
        alpha=settings.require("lora_alpha", float),
        dropout=settings.get("lora_dropout", float, 0.0),
        targets=tuple(target for target in get_args(Target) if target in present),
    )
    return config, tensors


def _named_once(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The updates by their names below the layers; the same tensors' other names and frozen parts are left out."""
    own_list = re.compile(r"^lang_encoder\.base_model\.model\.gated_cross_attn_layers\.(\d+)\.")
    for key, tensor in tensors.items():
        if ".old_decoder_blocks." in key or (not is_lora(key) and not key.startswith(RESAMPLER_KEY)):
            continue
        yield own_list.sub(rf"{LORA_KEY}\1.gated_cross_attn_layer.", key), tensor


def _copy_files(source: Path, target: Path, *, weights: bool) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and (weights or not file.name.endswith(_WEIGHT_SUFFIXES)):
            shutil.copyfile(file, target / file.name)
