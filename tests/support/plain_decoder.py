"""The decoder of an exported checkpoint, a Qwen2, as a checkpoint of its own, as other people's programs know it.

python -m tests.support.plain_decoder CHECKPOINT OUTPUT
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model"
_OF_IMAGES = ("mm_", "num_experts", "moe_", "use_m", "image_", "tokenizer_", "lora_dim", "system_prompt_", "parrot_sys")
_DECODER = re.compile(
    r"model\.(embed_tokens|norm)\.|lm_head\.|model\.layers\.\d+\.(input_layernorm|post_attention_layernorm|self_attn|mlp)\."
)


def write_plain_decoder(folder: Path, source: Path = FIXTURE) -> Path:
    """A Qwen2 with the weights of a checkpoint's decoder (the fixture's), and its tokenizer; returns the folder."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copyfile(file, folder / file.name)
    tensors = load_file(source / "model.safetensors")
    decoder = {key: own for key, own in tensors.items() if _DECODER.match(key)}
    save_file(decoder, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    plain = {key: value for key, value in config.items() if not key.startswith(_OF_IMAGES)}
    plain |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    return folder


if __name__ == "__main__":
    write_plain_decoder(Path(sys.argv[2]), Path(sys.argv[1]))
