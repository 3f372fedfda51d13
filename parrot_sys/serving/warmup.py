"""A first answer that nobody waits for: what is made at the first use is there when requests come."""

from __future__ import annotations

from PIL import Image

from parrot_sys.data.packing import Sample
from parrot_sys.data.parts import human_turn
from parrot_sys.data.picture import join_pictures
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.engine.config import EngineConfig
from parrot_sys.engine.core import Engine
from parrot_sys.engine.requests import EngineRequest
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.inference.requests import free_rows, num_rows

_NEW_TOKENS = 3
_BLOCK_SIZE = 16


def warm_up(model: ParrotForConditionalGeneration, processor: ParrotProcessor) -> None:
    """Answers a question about a picture, and one without, on an engine of their own."""
    samples = []
    for pictures in ([], processor.pictures([Image.new("RGB", (64, 64))])):
        turn = human_turn("?", images=len(pictures))
        ids = processor.format_conversation([turn], add_generation_prompt=True)["input_ids"]
        pixels, rows = join_pictures(pictures)
        sample = Sample(input_ids=ids, pixel_values=pixels, pictures=rows)
        if free_rows(model.config, sample) >= _NEW_TOKENS:
            samples.append(sample)
    rows_needed = sum(num_rows(model.config, sample) + _NEW_TOKENS for sample in samples)
    blocks = rows_needed // _BLOCK_SIZE + 2 * len(samples) + 1
    engine = Engine(model.lockstep, EngineConfig(num_blocks=blocks, block_size=_BLOCK_SIZE))
    for sample in samples:
        engine.submit(EngineRequest(sample=sample, max_new_tokens=_NEW_TOKENS))
    while engine.has_requests:
        engine.step()
