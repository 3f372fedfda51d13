"""Capabilities of a cluster: figures from data sheets, and the assumed shares of them that a step reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from parrot_sys.config_values import nearest
from parrot_sys.errors import ConfigError
from parrot_sys.training.metrics import PEAK_TFLOPS


@dataclass(frozen=True, slots=True)
class GPUType:
    """Published figures of a GPU; GB are 1e9 bytes, links count one direction."""

    memory_gb: float
    bf16_tflops: float  # dense
    hbm_tb_s: float
    node_gb_s: float  # to the other GPUs of its node
    network_gb_s: float  # to other nodes: its share of the network adapters of the vendor's reference server
    source: str


GPUS = {
    "A100-40GB": GPUType(40, PEAK_TFLOPS["A100"], 1.555, 300, 25, "NVIDIA A100 data sheet (SXM), DGX A100"),
    "A100-80GB": GPUType(80, PEAK_TFLOPS["A100"], 2.039, 300, 25, "NVIDIA A100 data sheet (SXM), DGX A100"),
    "A800-80GB": GPUType(80, PEAK_TFLOPS["A800"], 2.039, 200, 25, "NVIDIA A800 data sheet (SXM)"),
    "H100": GPUType(80, PEAK_TFLOPS["H100"], 3.35, 450, 50, "NVIDIA H100 data sheet (SXM), DGX H100"),
    "H800": GPUType(80, PEAK_TFLOPS["H800"], 3.35, 200, 50, "NVIDIA H800 data sheet (SXM)"),
    "H200": GPUType(141, PEAK_TFLOPS["H200"], 4.8, 450, 50, "NVIDIA H200 data sheet (SXM), DGX H200"),
    "B200": GPUType(180, 2250, 8.0, 900, 50, "NVIDIA HGX B200 data sheet, DGX B200"),
    "L40S": GPUType(48, PEAK_TFLOPS["L40S"], 0.864, 32, 12.5, "NVIDIA L40S data sheet (PCIe 4.0 x16), 100 Gb/s a GPU"),
}


@dataclass(kw_only=True, frozen=True, slots=True)
class Efficiency:
    """Shares of the data-sheet figures that a step reaches. Assumptions, not measurements: put your own in."""

    gemm: float = 0.6
    """Matrix products, of the bf16 peak."""
    attention: float = 0.35
    """Variable-length flash attention, of the bf16 peak."""
    hbm: float = 0.75
    """Memory-bound kernels, of the memory bandwidth."""
    link: float = 0.75
    """Collectives, of the bandwidth of their slowest link."""
    memory: float = 0.93
    """Of the GPU's memory; the rest is for CUDA, NCCL and fragmentation."""
    overlap: float = 0.8
    """Of the last backward pass, that hides the reduction of gradients."""
    kernel_us: float = 4.0
    """Shortest time of a kernel, with its launch."""
    latency_us: float = 10.0
    """Start of a collective, for each doubling of its ranks."""

    def __post_init__(self) -> None:
        for name in ("gemm", "attention", "hbm", "link", "memory"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"cluster.efficiency.{name} must be in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"cluster.efficiency.overlap must be in [0, 1], got {self.overlap}")
        for name in ("kernel_us", "latency_us"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"cluster.efficiency.{name} must be a finite number >= 0, got {getattr(self, name)}")


@dataclass(kw_only=True, frozen=True, slots=True)
class ClusterConfig:
    """GPUs and links; a figure that is not set comes from the data sheet of `gpu`."""

    gpu: str = "H100"
    """Type of GPU: A100-40GB, A100-80GB, A800-80GB, H100, H800, H200, B200 or L40S."""
    nodes: int = 1
    """Servers."""
    gpus_per_node: int = 8
    """GPUs of a server."""
    memory_gb: float | None = None
    """Memory of a GPU in GB (1e9 bytes)."""
    bf16_tflops: float | None = None
    """Dense bf16 peak of a GPU."""
    hbm_tb_s: float | None = None
    """Memory bandwidth of a GPU in TB/s."""
    node_gb_s: float | None = None
    """Bandwidth of a GPU to the others of its node, one direction, in GB/s."""
    network_gb_s: float | None = None
    """Bandwidth of a GPU's share of the network, one direction, in GB/s."""
    efficiency: Efficiency = field(default_factory=Efficiency)
    """Shares of these figures that a step reaches."""

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            guess = nearest(self.gpu, list(GPUS)) or nearest(self.gpu.upper(), list(GPUS))
            hint = f"; did you mean {guess}?" if guess else "; for another one set memory_gb and the other figures"
            raise ConfigError(f"cluster.gpu must be one of {', '.join(GPUS)}, got {self.gpu!r}{hint}")
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("memory_gb", "bf16_tflops", "hbm_tb_s", "node_gb_s", "network_gb_s"):
            if (value := getattr(self, name)) is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"cluster.{name} must be a finite number > 0, got {value}")

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def type(self) -> GPUType:
        """The figures in use: those of the data sheet with the user's in their place."""
        sheet = GPUS[self.gpu]
        return GPUType(
            self.memory_gb or sheet.memory_gb,
            self.bf16_tflops or sheet.bf16_tflops,
            self.hbm_tb_s or sheet.hbm_tb_s,
            self.node_gb_s or sheet.node_gb_s,
            self.network_gb_s or sheet.network_gb_s,
            sheet.source,
        )

    @property
    def usable_bytes(self) -> float:
        """Memory of a GPU that a run may fill."""
        return self.type.memory_gb * 1e9 * self.efficiency.memory

    @property
    def peak_flops(self) -> float:
        """Dense bf16 peak of a GPU in FLOP/s."""
        return self.type.bf16_tflops * 1e12

    def gemm_seconds(self, flops: float) -> float:
        """Time of matrix products."""
        return flops / (self.peak_flops * self.efficiency.gemm)

    def attention_seconds(self, flops: float) -> float:
        """Time of flash attention."""
        return flops / (self.peak_flops * self.efficiency.attention)

    def memory_seconds(self, nbytes: float) -> float:
        """Time of memory-bound kernels that read and write `nbytes` in all."""
        return nbytes / (self.type.hbm_tb_s * 1e12 * self.efficiency.hbm)

    def link_bytes_per_second(self, size: int, stride: int) -> float:
        """Bandwidth of a rank in a group of `size` ranks that lie `stride` apart.

        A group within a node uses the links of the node. One over several nodes is as fast as the network adapters of
        its members on a node together (hierarchical rings and trees of NCCL), at most as the links inside it.
        """
        figures = self.type
        members = max(1, min(size, self.gpus_per_node // stride))
        rate = figures.node_gb_s if members >= size else min(figures.node_gb_s, figures.network_gb_s * members)
        return rate * 1e9 * self.efficiency.link

    def collective_seconds(self, sent: float, size: int, stride: int, calls: float = 1.0) -> float:
        """Time of `calls` collectives in which a rank sends `sent` bytes in all; start-up grows with log2(size)."""
        if size == 1 or calls == 0:
            return 0.0
        start = self.efficiency.latency_us * 1e-6 * math.log2(size)
        return sent / self.link_bytes_per_second(size, stride) + calls * start
