"""The loaders that `bench_loader` compares with: Hugging Face's libraries, and megatron-energon."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from parrot_sys.data.constants import DEFAULT_SYSTEM_PROMPT, IGNORE_ID, IMAGE_TOKEN, IMAGE_TOKEN_ID

Samples = Iterator[list[tuple[str, Any, Any, Any]]]
"""Steps of (id, ids, labels, pixels or None)."""
_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def _as_it_is(sample: Any) -> Any:
    """What energon calls to make a sample of the members of a shard."""
    return sample


class Encoder:
    """A record as LLaVA's code encodes it, with transformers' tokenizer and image processor."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor

        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.processor = CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_convert_rgb=True
        )
        self.paper = tuple(int(mean * 255) for mean in self.processor.image_mean)

    def text(self, turns: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation."""
        messages = [("system", DEFAULT_SYSTEM_PROMPT), *((turn["from"], turn["value"]) for turn in turns)]
        pieces: list[str] = []
        for number, (role, text) in enumerate(messages):
            end = "<|im_end|>" if number == len(messages) - 1 else "<|im_end|>\n"
            pieces += [f"<|im_start|>{_ROLES[role]}\n{text}{end}".split(IMAGE_TOKEN), f"<|im_start|>{_ROLES[role]}\n"]
        flat = [part for piece in pieces for part in (piece if isinstance(piece, list) else [piece])]
        encoded = iter(self.tokenizer(flat, add_special_tokens=False).input_ids)
        ids: list[int] = []
        labels: list[int] = []
        for (role, _), parts in zip(messages, pieces[::2], strict=True):
            own = list(next(encoded))
            for _ in parts[1:]:
                own += [IMAGE_TOKEN_ID, *next(encoded)]
            header = len(next(encoded))
            ids += own
            labels += [IGNORE_ID] * header + own[header:] if role == "gpt" else [IGNORE_ID] * len(own)
        return ids, labels

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """float32 [3, 336, 336], padded to a square first."""
        image = image.convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), self.paper)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return self.processor(square, return_tensors="pt")["pixel_values"][0]

    def join(self, samples: Sequence[tuple[str, list[int], list[int], Any]]) -> dict[str, Any]:
        """A padded batch."""
        pad, longest = self.tokenizer.pad_token_id or 0, max(len(ids) for _, ids, _, _ in samples)
        images = [pixels for *_, pixels in samples if pixels is not None]
        return {
            "names": [name for name, *_ in samples],
            "sizes": [len(ids) for _, ids, _, _ in samples],
            "shown": [pixels is not None for *_, pixels in samples],
            "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for _, ids, _, _ in samples]),
            "labels": torch.tensor([labels + [IGNORE_ID] * (longest - len(labels)) for _, _, labels, _ in samples]),
            "pixel_values": torch.stack(images) if images else None,
        }


def _apart(batches: Iterator[dict[str, Any]]) -> Samples:
    for batch in batches:
        images = iter(() if batch["pixel_values"] is None else batch["pixel_values"].numpy())
        rows = zip(batch["names"], batch["sizes"], batch["shown"], batch["input_ids"], batch["labels"], strict=True)
        yield [
            (name, ids[:size].numpy(), labels[:size].numpy(), next(images) if shown else None)
            for name, size, shown, ids, labels in rows
        ]


def hugging_face(folder: Path, workers: int, batch: int) -> Samples:
    """`datasets`, and a DataLoader whose collator does the work."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(
        "json", data_files=str(folder / "records.json"), split="train", cache_dir=str(folder / "hf")
    )
    encoder = Encoder(folder)

    def collate(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        samples = []
        for record in records:
            name = record.get("image")
            pixels = None
            if name is not None:
                with Image.open(folder / "pictures" / name) as image:
                    pixels = encoder.pixels(image)
            samples.append((record["id"], *encoder.text(record["conversations"]), pixels))
        return encoder.join(samples)

    loader = torch.utils.data.DataLoader(rows, batch_size=batch, shuffle=True, num_workers=workers, collate_fn=collate)
    return _apart(iter(loader))


def energon(folder: Path, workers: int, batch: int) -> Samples:
    """energon's loader over the shards, with the same encoding in its task encoder."""
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless
    from megatron.energon.task_encoder.cooking import Cooker

    encoder = Encoder(folder)

    class Task(DefaultTaskEncoder):  # type: ignore[misc]
        cookers = (Cooker(stateless(_as_it_is)),)
        decoder = None

        def encode_sample(self, sample: Any) -> Any:
            record = sample["json"]
            record = record if isinstance(record, dict) else json.loads(record)
            pixels = None
            if (data := sample.get("jpg")) is not None:
                with Image.open(io.BytesIO(data)) as image:
                    pixels = encoder.pixels(image)
            return (record["id"], *encoder.text(record["conversations"]), pixels)

        def batch(self, samples: list[Any]) -> dict[str, Any]:
            return encoder.join(samples)

        def encode_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            return batch

    dataset = get_train_dataset(
        folder / "shards",
        batch_size=batch,
        shuffle_buffer_size=256,
        max_samples_per_sequence=100,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        task_encoder=Task(),
        repeat=False,
    )
    return _apart(iter(get_loader(dataset)))


PEERS: dict[str, Callable[[Path, int, int], Samples]] = {"hugging_face": hugging_face, "energon": energon}
