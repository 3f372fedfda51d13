"""A tiny Wings on a decoder like Qwen2's, with learners and routers that say something, and how close is close."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.models.llm import LLMConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.build import build_model
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.wings.config import WingsConfig
from parrot_sys.towers import VisionConfig

QWEN = ParrotConfig(
    vision=VisionConfig(
        image_size=28,
        patch_size=14,
        hidden_size=12,
        num_layers=2,
        num_attention_heads=2,
        ffn_hidden_size=20,
        select_feature="patch",
    ),
    moe=TextGuidedMoEConfig(num_experts=0),
    wings=WingsConfig(rank=5, system_prompt_length=3, router_positions=48),
    llm=LLMConfig(
        hidden_size=24,
        num_layers=3,
        num_attention_heads=6,
        num_query_groups=2,
        ffn_hidden_size=28,
        vocab_size=53,
        rope_base=10_000.0,
        max_position_embeddings=64,
    ),
    max_seq_len=48,
)


def build(config: ParrotConfig) -> MultimodalModel:
    """Model in eval mode whose learners and routers are not at their initial zeros."""
    torch.manual_seed(3)
    model = build_model(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_up"):
            torch.nn.init.normal_(parameter, std=0.3)
        if "_down" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if "router" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Within 2e-5 of the largest value of all tensors together."""
    scale = max(float(each.abs().max()) for each in theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        assert float((our - their).abs().max()) < 2e-5 * scale
