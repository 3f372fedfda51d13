"""`python -m parrot_sys.integrations.vlmevalkit` beside a torchvision for CUDA, whose operators a CPU torch lacks.

Nothing calls them here, but torchvision describes them when it is imported, and VLMEvalKit imports it.
"""

from __future__ import annotations

import sys

import torch

OPERATORS = (
    *("nms", "qnms", "qroi_align", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward"),
    *("ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward"),
    *("deform_conv2d", "_deform_conv2d_backward"),
)


def main() -> None:
    """Declares the operators where torchvision did not bring them, and runs the module."""
    if not torch.cuda.is_available():
        for name in OPERATORS:
            torch.library.define(f"torchvision::{name}", "(Tensor a) -> Tensor")
    from parrot_sys.integrations.vlmevalkit.__main__ import main as run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
