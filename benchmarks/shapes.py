"""Named shapes that benchmarks share."""

from __future__ import annotations

from parrot_kernels.testing import MoEShape

# Small enough for two cores. `cpu_dense` has Parrot's 577 rows an image and 6 experts at a quarter of its width.
CPU_DENSE = MoEShape(images=4, rows=577, hidden=1024, experts=6, ffn=1024, topk=2)
# Where the number of calls decides, not the size of the products.
CPU_MANY_SMALL = MoEShape(images=64, rows=17, hidden=256, experts=6, ffn=256, topk=2)

TEXT_ROWS = 60
"""Guiding text rows of each image."""
