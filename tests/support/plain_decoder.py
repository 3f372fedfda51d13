"""The decoder of the fixture of Parrot as a checkpoint of its own, as other people's programs know it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model"
_OF_IMAGES = ("mm_", "num_experts", "moe_", "use_m", "image_aspect", "tokenizer_")


def write_plain_decoder(folder: Path) -> Path:
    """A Qwen2 with the weights of the fixture's decoder, and its tokenizer; returns the folder."""
    folder.mkdir(parents=True)
    for file in FIXTURE.iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copyfile(file, folder / file.name)
    tensors = load_file(FIXTURE / "model.safetensors")
    decoder = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
    save_file({key: own for key, own in tensors.items() if key.startswith(decoder)}, folder / "model.safetensors")
    config = json.loads((FIXTURE / "config.json").read_text(encoding="utf-8"))
    plain = {key: value for key, value in config.items() if not key.startswith(_OF_IMAGES)}
    plain |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    return folder
