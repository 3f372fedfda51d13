"""A tiny LLaVA-NeXT with random weights, as training exports it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from parrot_sys.data.images import ImageProcessor
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.megatron.runtime.initialize import initialize
from parrot_sys.systems.build import build_model
from parrot_sys.systems.export import export_released
from parrot_sys.systems.llava.config import LlavaConfig
from tests.megatron.parrot_reference import CONFIG

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model"


def write_tiled_model(folder: Path) -> Path:
    """Writes the model, with tokenizer and preprocessing, into a folder that is not there yet."""
    initialize()
    tokenizer = ParrotProcessor.for_tower(TOKENIZER, "clip", 28).tokenizer
    model = replace(
        CONFIG,
        vision=replace(CONFIG.vision, select_feature="patch"),
        moe=replace(CONFIG.moe, num_experts=0),
        llm=replace(CONFIG.llm, vocab_size=len(tokenizer), max_position_embeddings=1024),
        llava=LlavaConfig(grids=((1, 2), (2, 1), (2, 2))),
        max_seq_len=1024,
    )
    processor = ParrotProcessor(tokenizer, ImageProcessor.for_tower("clip", 28), tiling=model.tiling)
    export_released(build_model(model), folder, save_processor=processor.save_pretrained)
    return folder
