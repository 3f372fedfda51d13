"""Size and SHA-256 of every file of a checkpoint: written with it, compared before it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from parrot_sys.errors import CheckpointError
from parrot_sys.models.checkpoint_files import CHECKSUMS, COMMON, FORMAT, INDEX, MODEL_CONFIG, PROCESSOR
from parrot_sys.parallel.agreement import gather_everywhere, on_first_rank

Digest = tuple[int, str]

_ALWAYS = (INDEX, FORMAT)
_READ = (*_ALWAYS, COMMON, MODEL_CONFIG)
_CHUNK = 1 << 20  # bytes; larger ones would stay with the allocator beside the weights
_SHOW_FROM = 1 << 30  # bytes; less than this is hashed in a second


def digest_file(path: Path, *, sync: bool = False, bar: tqdm | None = None) -> Digest:
    """(bytes, SHA-256 in hexadecimal) of a file.

    Args:
        path: the file.
        sync: also wait until the disk has it.
        bar: moved by the bytes that were read.
    """
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            size += len(chunk)
            if bar is not None:
                bar.update(len(chunk))
    return size, sha.hexdigest()


def write_checksums(folder: Path, known: dict[str, Digest]) -> None:
    """Writes the checksums of all files of `folder`; everything has reached the disk afterwards.

    Args:
        folder: a checkpoint that is complete but for this file.
        known: path inside the folder -> digest, of files that were hashed and synced before.
    """
    digests = {name: known.get(name) or digest_file(folder / name, sync=True) for name in _files(folder)}
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as file:
        json.dump(digests, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for directory in {(folder / name).parent for name in digests} | {folder, folder.parent}:
        sync_directory(directory)


def verify_checksums(folder: str | Path) -> None:
    """Compares a checkpoint with its checksums; every rank calls it and reads a part of the files.

    Raises:
        CheckpointError: a file is missing, has another size or other bytes; names it, on every rank.
    """
    folder = Path(folder)
    wanted = on_first_rank(lambda: _read_checksums(folder))
    # Big files first, dealt out in turn: ranks end at about the same time.
    names = sorted(wanted, key=lambda name: (-wanted[name][0], name))[dist.get_rank() :: dist.get_world_size()]
    total = sum(wanted[name][0] for name in names)
    quiet = dist.get_rank() > 0 or total < _SHOW_FROM
    with tqdm(total=total, desc=f"verify {folder.name}", unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        damaged = [text for name in names if (text := _damage(folder, name, wanted[name], bar))]
    if found := sorted(text for texts in gather_everywhere(damaged) for text in texts):
        raise CheckpointError(
            f"{folder} is damaged: {'; '.join(found)}; take another checkpoint, or copy this one again"
        )


def sync_directory(directory: Path) -> None:
    """Waits until the disk knows what was created, renamed or removed in `directory`."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> Iterable[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _read_checksums(folder: Path) -> dict[str, Digest]:
    path = folder / CHECKSUMS
    advice = "take another checkpoint, or load this one unverified (checkpoint.verify=false in training)"
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
        wanted = {name: (int(size), str(sha)) for name, (size, sha) in pairs}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{folder} cannot be verified: {path.name} is missing or no list of checksums ({type(error).__name__}: "
            f"{error}); {advice}"
        ) from error
    unlisted = sorted(name for name in {*filter(_is_read, _files(folder)), *_ALWAYS} if name not in wanted)
    outside = [name for name in wanted if Path(name).is_absolute() or ".." in Path(name).parts]
    if unlisted or outside or len(wanted) < len(pairs):
        what = f"no checksum for {', '.join(unlisted)}" if unlisted else "files outside the folder, or one twice"
        raise CheckpointError(f"{folder} is damaged: {path.name} holds {what}; {advice}")
    return wanted


def _is_read(name: str) -> bool:
    """Whether a file is one that a checkpoint is loaded from."""
    return name.endswith(".distcp") or name in _READ or Path(name).parts[0] == PROCESSOR


def _damage(folder: Path, name: str, wanted: Digest, bar: tqdm) -> str | None:
    """Describes what is wrong with a file; None when nothing is."""
    path = folder / name
    try:
        if not stat.S_ISREG((status := path.stat()).st_mode):
            return f"{name} is no file"
        if (size := status.st_size) != wanted[0]:
            return f"{name} has {size} bytes instead of {wanted[0]}"
        same = digest_file(path, bar=bar)[1] == wanted[1]
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if same else f"{name} has other bytes than were written (SHA-256)"
