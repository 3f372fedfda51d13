"""Megatron-Bridge's `pretrain` with a model of parrot_sys, on the CPU. Arguments: an exported directory, TP, PP.

Prints the loss of each step. Transformer Engine and other packages for GPUs, which Megatron-Bridge imports, are stubs.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.strategies.nvrx  # noqa: F401  (before the stubs)
import torch
from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401

from parrot_sys.megatron.runtime import cpu_layer
from tests.megatron import te_stub

cpu_layer.widen()
te_stub.install("nvidia_resiliency_ext", "modelopt")
te_stub.newer_typing()

from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider  # noqa: E402
from megatron.bridge.training import train as bridge_train  # noqa: E402
from megatron.bridge.training.config import (  # noqa: E402
    CheckpointConfig,
    ConfigContainer,
    DistributedInitConfig,
    LoggerConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.pretrain import pretrain  # noqa: E402

import parrot_sys.data.packing as packing  # noqa: E402
from parrot_sys.data.processor import ParrotProcessor  # noqa: E402
from parrot_sys.integrations.megatron_bridge.provider import ParrotProvider, forward_step  # noqa: E402
from parrot_sys.megatron.runtime.adam import install_adam  # noqa: E402

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parrot_tiny"
STEPS, MICRO_BATCHES, SAMPLES = 3, 2, 2


def batches(directory: Path, rows_per_image: int) -> list[Any]:
    """The micro-batches of every step."""
    processor = ParrotProcessor.from_pretrained(directory)
    samples = []
    for record in json.loads((FIXTURE / "conversations.json").read_text(encoding="utf-8"))[: MICRO_BATCHES * SAMPLES]:
        encoded = processor.format_conversation(record["conversations"])
        samples.append(
            packing.Sample(
                input_ids=torch.tensor(encoded["input_ids"]),
                labels=torch.tensor(encoded["labels"]),
                pixel_values=processor.images([FIXTURE / f"image_{record['image']}.png"]),
            )
        )
    groups = [samples[start : start + SAMPLES] for start in range(0, len(samples), SAMPLES)]
    return [packing.pack_samples(group, num_visual_rows=rows_per_image) for group in groups]


@dataclass(kw_only=True)
class Batches(DatasetProvider):
    """The same micro-batches in each step."""

    directory: str
    rows_per_image: int
    dataloader_type: Any = "external"

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, None, None]:
        """An endless iterator for training."""
        own = batches(Path(self.directory), self.rows_per_image)

        def again() -> Iterator[Any]:
            while True:
                yield from own

        return again(), None, None


def main() -> None:
    """Trains for three steps."""
    directory, tensor, stages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    layout = {"tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1}
    provider = ParrotProvider.from_checkpoint(directory, **layout, pipeline_model_parallel_size=stages)
    assert provider.parrot is not None
    install_adam()
    config = ConfigContainer(
        model=provider,
        train=TrainingConfig(micro_batch_size=1, global_batch_size=MICRO_BATCHES, train_iters=STEPS, manual_gc=False),
        validation=ValidationConfig(eval_iters=0, eval_interval=None),
        optimizer=OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-3, clip_grad=1.0, weight_decay=0.0),
        scheduler=SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            lr_decay_iters=STEPS,
            start_weight_decay=0.0,
            end_weight_decay=0.0,
        ),
        dataset=Batches(directory=directory, rows_per_image=provider.parrot.rows_per_image, num_workers=0),
        logger=LoggerConfig(log_interval=1),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=provider.vocab_size - 1),
        checkpoint=CheckpointConfig(),
        dist=DistributedInitConfig(distributed_backend="gloo"),
    )
    losses = []
    log = bridge_train.training_log

    def kept(loss_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        losses.extend(float(value) for name, value in loss_dict.items() if name == "lm loss")
        return log(loss_dict, *args, **kwargs)

    bridge_train.training_log = kept
    bridge_train.get_tensor_shapes_adjust_fn_for_distillation = lambda *_, **__: None  # (of the stub for modelopt)
    pretrain(config, forward_step)
    if losses:
        print(" ".join(f"{loss:.6f}" for loss in losses), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
