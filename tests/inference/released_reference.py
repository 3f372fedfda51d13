"""The released Parrot in plain torch and transformers, sample by sample, with the released parameter names."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parrot_tiny"
IMAGE, IGNORE, PAD = -200, -100, 630


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A tiny model; the defaults differ from the fixture in every size."""

    tower: str = "clip"
    hidden_size: int = 48
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 40
    experts: int = 3
    inner: int = 20
    residual_weight: float | None = 0.3
    """None: no residual (use_moe_residual false)."""
    use_moe: bool = True
    tied: bool = False
    projector: int = 2


class _Expert(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Moe(nn.Module):
    """Released rule: the CLS row attends over the text, the gate scores what it read, every expert sees every row."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.hidden_size, shape.experts, bias=False)
        self.experts = nn.ModuleList(_Expert(shape.hidden_size, shape.inner) for _ in range(shape.experts))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        attention = (image[:1] @ text.T / math.sqrt(image.shape[1])).softmax(-1)
        probs = self.gate(attention @ text).softmax(-1)[0]
        output = sum(probs[e] * expert(image) for e, expert in enumerate(self.experts))
        return output if self.shape.residual_weight is None else output + self.shape.residual_weight * image


class ReleasedParrot(Qwen2ForCausalLM):
    """State dict names are those of a released checkpoint."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        super().__init__(
            Qwen2Config(
                vocab_size=640,
                hidden_size=shape.hidden_size,
                num_hidden_layers=3,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                intermediate_size=shape.ffn,
                max_position_embeddings=512,
                rope_theta=5000.0,
                rms_norm_eps=1e-5,
                tie_word_embeddings=shape.tied,
                attn_implementation="eager",
            )
        )
        sizes: dict[str, Any] = {
            "hidden_size": 24,
            "intermediate_size": 36,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": 28,
            "patch_size": 7,
            "attn_implementation": "eager",
        }
        self.tower_config = (
            CLIPVisionConfig(**sizes) if shape.tower == "clip" else SiglipVisionConfig(**sizes, vision_use_head=False)
        )
        tower = CLIPVisionModel(self.tower_config) if shape.tower == "clip" else SiglipVisionModel(self.tower_config)
        holder = nn.Module()
        holder.vision_tower = nn.Module()
        holder.vision_tower.vision_model = tower
        self.model.vision_tower = holder
        layers: list[nn.Module] = [nn.Linear(24, shape.hidden_size)]
        for _ in range(shape.projector - 1):
            layers += [nn.GELU(), nn.Linear(shape.hidden_size, shape.hidden_size)]
        self.model.mm_projector = nn.Sequential(*layers)
        self.model.moe_model = _Moe(shape)
        with torch.no_grad():
            for parameter in self.parameters():  # large enough that routing and every bias matter
                parameter.add_(torch.randn_like(parameter) * 0.08)

    def encode(self, pixels: Tensor) -> Tensor:
        tower = self.model.vision_tower.vision_tower.vision_model
        rows = tower(pixels, output_hidden_states=True).hidden_states[-2]
        if self.shape.tower == "siglip":
            rows = torch.cat([rows.mean(1, keepdim=True), rows], 1)
        return self.model.mm_projector(rows)

    def sample_logits(self, ids: Tensor, labels: Tensor | None, images: Tensor | None) -> tuple[Tensor, Tensor]:
        """One sample: ids [N] with markers -> (logits [rows, vocabulary], labels of the rows)."""
        targets = torch.full_like(ids, IGNORE) if labels is None else labels
        is_text = ids != IMAGE
        guiding = self.model.embed_tokens(ids[is_text & (targets == IGNORE)])
        features = iter(self.encode(images)) if images is not None and len(images) else iter(())
        rows, row_targets = [], []
        for token, target in zip(ids.tolist(), targets.tolist(), strict=True):
            if token == IMAGE:
                image = next(features)
                rows.append(self.model.moe_model(image, guiding) if self.shape.use_moe else image)
                row_targets += [IGNORE] * len(image)
            else:
                rows.append(self.model.embed_tokens(torch.tensor([token])))
                row_targets.append(target)
        hidden = torch.cat(rows)
        return super().forward(inputs_embeds=hidden[None], use_cache=False).logits[0], torch.tensor(row_targets)

    def greedy(self, ids: Tensor, images: Tensor | None, count: int) -> list[int]:
        """`count` tokens, the whole sequence again at each step, with the route of the prompt."""
        answer: list[int] = []
        for _ in range(count):
            so_far = torch.cat([ids, torch.tensor(answer, dtype=ids.dtype)])
            labels = torch.cat(
                [torch.full_like(ids, IGNORE), torch.tensor(answer, dtype=ids.dtype)]
            )  # answers guide nothing
            answer.append(int(self.sample_logits(so_far, labels, images)[0][-1].argmax()))
        return answer


def batch_loss(results: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over all labels of the batch; the row before a label predicts it."""
    logits = torch.cat([rows[:-1] for rows, _ in results])
    return F.cross_entropy(logits, torch.cat([targets[1:] for _, targets in results]), ignore_index=IGNORE)


def write_checkpoint(model: ReleasedParrot, directory: Path, **extra: Any) -> dict[str, Tensor]:
    """Write the released layout (tower inside, its config in `vision_tower`) and return the tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
    ):
        shutil.copy(FIXTURE / "model" / name, directory / name)
    shape, llm = model.shape, model.config
    hf = {
        "model_type": "parrot_qwen2",
        "architectures": ["ParrotQwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "num_hidden_layers": llm.num_hidden_layers,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_key_value_heads,
        "intermediate_size": llm.intermediate_size,
        "vocab_size": llm.vocab_size,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": shape.tied,
        "tokenizer_model_max_length": 256,
        "mm_hidden_size": 24,
        "mm_projector_type": f"mlp{shape.projector}x_gelu",
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "image_aspect_ratio": "pad",
        "use_moe": shape.use_moe,
        "num_experts": shape.experts,
        "moe_hidden_size": llm.hidden_size,
        "moe_intermediate_size": shape.inner,
        "moe_top_k": 2,
        "use_moe_residual": shape.residual_weight is not None,
        "moe_weight": 0.1 if shape.residual_weight is None else shape.residual_weight,
        **extra,
    }
    (directory / "config.json").write_text(json.dumps(hf))
    write_tower_files(model, directory / "tower")
    state = {
        key: tensor.detach().clone()
        for key, tensor in model.state_dict().items()
        if not (shape.tied and key == "lm_head.weight")
    }
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return state


def write_tower_files(model: ReleasedParrot, directory: Path) -> None:
    """config.json and preprocessor_config.json of the tower."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in model.tower_config.to_dict().items() if not key.startswith("_")}
    (directory / "config.json").write_text(json.dumps(config))
    preprocessor = json.loads((FIXTURE / "clip-vit-tiny" / "preprocessor_config.json").read_text())
    preprocessor |= {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def random_batch(counts: list[int], *, seed: int = 3) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Samples with so many images each: ids and labels (two turns each), and all pixels in marker order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randint(0, 600, (count,), generator=generator)

    ids, labels = [], []
    for index, count in enumerate(counts):
        marker = torch.tensor([IMAGE])
        question = torch.cat([draw(3 + index), *(torch.cat([marker, draw(2)]) for _ in range(count))])
        answer, second, reply = draw(4), draw(3), draw(2 + index)
        ids.append(torch.cat([question, answer, second, reply]))
        labels.append(torch.cat([torch.full_like(question, IGNORE), answer, torch.full_like(second, IGNORE), reply]))
    return ids, labels, torch.randn(sum(counts), 3, 28, 28, generator=generator)


def pad(rows: list[Tensor], value: int, *, left: bool = False) -> Tensor:
    """[B, N], padded on one side."""
    width = max(map(len, rows))
    sides = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
    return torch.stack([F.pad(row, side, value=value) for row, side in zip(rows, sides, strict=True)])
