"""`python -m parrot_sys.integrations.vlmevalkit` for tests with invented tables, and a torchvision for CUDA perhaps.

Nothing calls torchvision's operators here, but it describes them when it is imported, and VLMEvalKit imports it. A CPU
torch lacks them.
"""

from __future__ import annotations

import os
import sys

import torch

OPERATORS = (
    *("nms", "qnms", "qroi_align", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward"),
    *("ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward"),
    *("deform_conv2d", "_deform_conv2d_backward"),
)


def prepare(kit: str) -> None:
    """Makes a checkout of the kit importable; it then takes tables of any content, and asks nobody for prices."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    if not torch.cuda.is_available():
        for name in OPERATORS:
            torch.library.define(f"torchvision::{name}", "(Tensor a) -> Tensor")
    sys.path.insert(0, kit)
    from vlmeval.dataset.image_mcq import ImageMCQDataset

    ImageMCQDataset.DATASET_MD5.clear()


def main() -> None:
    """Runs the module."""
    prepare(sys.argv[sys.argv.index("--kit") + 1])
    from parrot_sys.cli import run_main
    from parrot_sys.integrations.vlmevalkit.__main__ import main as run

    sys.exit(run_main(run, sys.argv[1:]))


if __name__ == "__main__":
    main()
