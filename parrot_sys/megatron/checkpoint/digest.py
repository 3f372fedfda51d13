"""Digest of the weights in a training checkpoint."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from parrot_sys.megatron.checkpoint.reader import DataReader, as_data

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


def weights_digest(folder: Path) -> str:
    """SHA-256 over names, types, shapes and values of the weights; the same for every layout that wrote them.

    One tensor after the other is read; the optimizer, often three quarters of the bytes, is not.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    with as_data(folder):
        reader = DataReader(folder)
        for key, stored in sorted(reader.read_metadata().state_dict_metadata.items()):
            if not isinstance(stored, TensorStorageMetadata) or _OPTIMIZER.match(key):
                continue
            tensor = torch.zeros(stored.size, dtype=stored.properties.dtype)
            load({key: tensor}, storage_reader=reader, no_dist=True)
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
