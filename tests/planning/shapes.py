"""Small models of each system, none of whose shapes was looked at while the formulas were written."""

from __future__ import annotations

from dataclasses import replace

from parrot_sys.models.llm import LLMConfig, TokenExpertsConfig
from parrot_sys.modules.gated_cross_attention import GatedCrossAttentionConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.perceiver import ResamplerConfig
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.llava.config import LlavaConfig
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig
from parrot_sys.systems.wings.config import WingsConfig
from parrot_sys.towers import VisionConfig

SHAPES = {
    "square CLIP, many heads, five dense experts": ParrotConfig(
        vision=VisionConfig(image_size=70, hidden_size=56, num_layers=3, num_attention_heads=4, ffn_hidden_size=112),
        moe=TextGuidedMoEConfig(num_experts=5, ffn_hidden_size=48),
        llm=LLMConfig(
            hidden_size=160,
            num_layers=5,
            num_attention_heads=10,
            num_query_groups=10,
            ffn_hidden_size=448,
            vocab_size=640,
        ),
    ),
    "SigLIP, grouped heads, tied head, top-1": ParrotConfig(
        vision=VisionConfig(
            type="siglip",
            image_size=56,
            hidden_size=40,
            num_layers=4,
            num_attention_heads=2,
            ffn_hidden_size=72,
            activation="gelu_pytorch_tanh",
        ),
        projector=ProjectorConfig(type="linear"),
        moe=TextGuidedMoEConfig(num_experts=4, ffn_hidden_size=96, routing="topk", topk=1),
        llm=LLMConfig(
            hidden_size=64,
            num_layers=6,
            num_attention_heads=8,
            num_query_groups=2,
            head_dim=16,
            ffn_hidden_size=136,
            vocab_size=300,
            tie_word_embeddings=True,
        ),
    ),
    "EfficientNet, deep projector, experts computed again": ParrotConfig(
        vision=VisionConfig(type="efficientnet_lite0", image_size=32, patch_size=32, hidden_size=1280),
        projector=ProjectorConfig(type="mlp3x_gelu"),
        moe=TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=104, routing="topk", topk=2, recompute=True),
        llm=LLMConfig(
            hidden_size=96,
            num_layers=4,
            num_attention_heads=4,
            num_query_groups=4,
            ffn_hidden_size=200,
            vocab_size=512,
            qkv_bias=False,
        ),
    ),
}
_SQUARE = SHAPES["square CLIP, many heads, five dense experts"]
_GROUPED = SHAPES["SigLIP, grouped heads, tied head, top-1"]
_PATCHES = replace(_SQUARE.vision, select_feature="patch")
_NO_EXPERTS = TextGuidedMoEConfig(num_experts=0)
_LLAMA = replace(_GROUPED.llm, family="llama", qkv_bias=False, tie_word_embeddings=False)
SYSTEMS = {
    "Parrot with LoRA": replace(
        _SQUARE, lora=LoRAConfig(rank=6, targets=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
    ),
    "Wings": replace(
        _SQUARE,
        vision=_PATCHES,
        moe=_NO_EXPERTS,
        wings=WingsConfig(rank=8, layers=(0, 2, 3, 4), router_positions=2048, system_prompt_length=4),
    ),
    "Wings, rule of the public code": replace(
        _SQUARE, vision=_PATCHES, moe=_NO_EXPERTS, wings=WingsConfig(rank=8, router_positions=2048, rule="released")
    ),
    "Wings with LoRA, grouped heads, every layer": replace(
        _GROUPED,
        vision=replace(_GROUPED.vision, select_feature="patch"),
        moe=_NO_EXPERTS,
        llm=replace(_LLAMA, head_dim=8),
        lora=LoRAConfig(rank=4, targets=("q_proj", "k_proj", "v_proj")),
        wings=WingsConfig(rank=12, router_positions=2048),
    ),
    "MultiModal-GPT": replace(
        _SQUARE,
        moe=_NO_EXPERTS,
        vision=_PATCHES,
        lora=LoRAConfig(rank=6),
        flamingo=FlamingoConfig(
            resampler=ResamplerConfig(num_latents=9, num_layers=2, num_attention_heads=2, head_dim=12),
            cross_attention=GatedCrossAttentionConfig(num_attention_heads=4, head_dim=20),
            every_n_layers=2,
            image_token_id=600,
        ),
    ),
    "LLaVA": replace(
        _SQUARE, vision=_PATCHES, moe=_NO_EXPERTS, llm=replace(_LLAMA, num_layers=4), llava=LlavaConfig(grids=())
    ),
    "LLaVA with tiles": replace(
        _SQUARE, vision=_PATCHES, moe=_NO_EXPERTS, llava=LlavaConfig(grids=((1, 2), (2, 1), (2, 2)))
    ),
    "token-routed decoder, four dense experts": replace(
        _SQUARE,
        moe=TextGuidedMoEConfig(num_experts=4, ffn_hidden_size=48),
        llm=LLMConfig(
            family="qwen3_moe",
            qkv_bias=False,
            hidden_size=96,
            num_layers=4,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=24,
            ffn_hidden_size=200,
            vocab_size=512,
            experts=TokenExpertsConfig(num_experts=6, topk=2, ffn_hidden_size=72, dense_layers=(1,)),
        ),
    ),
    "Qwen3 with LoRA": replace(
        _GROUPED,
        llm=replace(_GROUPED.llm, family="qwen3", qkv_bias=False),
        lora=LoRAConfig(rank=4, dropout=0.25, targets=("q_proj", "k_proj", "v_proj", "up_proj")),
    ),
}
"""Every system, with updates where they go."""
