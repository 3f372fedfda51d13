"""Benchmarks use the two threads that the committed results were measured with."""

from __future__ import annotations

import torch

torch.set_num_threads(2)
