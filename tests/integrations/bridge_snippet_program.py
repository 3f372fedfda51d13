"""The lines on Megatron-Bridge of docs/integrations.md, as they stand there. Argument: folder of a Hugging Face model.

The name of the public model becomes that folder, and the first `...` the settings of a CPU.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize
from tests.integrations.bridge_program import adapt_to_cpu, hugging_face_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


def main() -> None:
    """Runs the lines and compares what they export with the model's file."""
    folder = Path(sys.argv[1])
    initialize(ParallelConfig())
    hugging_face_model(folder)
    section = PAGE.read_text(encoding="utf-8").split("## Megatron-Bridge\n")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    lines = found[1].replace('"Qwen/Qwen3-30B-A3B"', f'"{folder}", torch_dtype=torch.float32')
    lines = lines.replace("\n...", "\nadapt_to_cpu(provider)", 1).replace("    ...", "    exported[name] = tensor")
    exported: dict[str, torch.Tensor] = {}
    exec(lines, {"torch": torch, "adapt_to_cpu": adapt_to_cpu, "exported": exported})
    saved = load_file(folder / "model.safetensors")
    equal = sum(torch.equal(exported[name], tensor) for name, tensor in saved.items())
    print(f"{equal} of {len(saved)} tensors bit-equal", flush=True)


if __name__ == "__main__":
    main()
