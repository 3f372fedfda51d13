"""Everything that touches Megatron-Core, Transformer Engine or apex.

Importing this package does not import Megatron; it only prepares that import for machines without CUDA (`cpu_layer`), which
has to happen first.
"""

from __future__ import annotations

from parrot_sys.megatron import cpu_layer

cpu_layer.install()
