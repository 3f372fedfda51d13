"""Tar files, as WebDataset and GNU tar write them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator

from parrot_sys.data.image_files import OpenFile
from parrot_sys.data.image_sources.archive import Archive, Member
from parrot_sys.errors import DataError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_STEP = 1 << 22  # bytes between two reports of progress


class TarArchive(Archive):
    """A tar file. A place is the first byte of a member and its size."""

    ENDINGS = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
    REFUSED = (
        "",
        "is a link; wanted a regular file",
        "is a folder; wanted a regular file",
        "is a device or a named pipe; wanted a regular file",
        "is a sparse file; wanted a regular file: pack it without --sparse",
    )

    def members(self, advance: Callable[[int], object]) -> Iterator[Member]:
        """All members; only the headers are read."""
        for info, _ in self.headers(advance):
            yield Member(info.name, info.offset_data, info.size, _refused(info))

    def headers(self, advance: Callable[[int], object]) -> Iterator[tuple[tarfile.TarInfo, int]]:
        """The header of each member, and the byte at which the next one begins."""
        reported = 0
        with self.file.open() as file:
            self._refuse_compressed(file.read(8))
            file.seek(0)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    seen: list[tarfile.TarInfo] = vars(tar)["members"]
                    while (info := tar.next()) is not None:
                        seen.clear()  # (the library keeps all that it has seen)
                        if info.size < 0 or tar.offset <= info.offset:
                            raise tarfile.ReadError(f"the header at byte {info.offset} has a wrong size")
                        if info.offset_data + info.size > self.state[0]:
                            raise tarfile.ReadError(f"the file ends inside {info.name!r}")
                        yield info, tar.offset
                        if tar.offset - reported > _STEP:
                            advance(tar.offset - reported)
                            reported = tar.offset
                    end = tar.offset
            except (tarfile.TarError, OSError, ValueError) as error:
                raise self._damaged(str(error)) from error
            # The library takes a damaged header for the end; a real end is a block of zeros.
            file.seek(end)
            if file.read(512) != bytes(512):
                raise self._damaged(f"byte {end} starts neither a member nor the end of the archive")
        advance(self.state[0] - reported)

    def open(self, first: int, second: int) -> OpenFile:
        """A member, as a file."""
        return self.file.section(first, second)

    def _refuse_compressed(self, start: bytes) -> None:
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise DataError(
                    f"image archive {self.name} is compressed ({name}), which allows no random access: "
                    "unpack it to a plain .tar; pictures are compressed already"
                )

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"image archive {self.name} is damaged: {reason}; pack or copy it again")


def _refused(info: tarfile.TarInfo) -> int:
    if info.issym() or info.islnk():
        return 1
    if info.isdir():
        return 2
    if not info.isfile():
        return 3
    return 4 if info.issparse() else 0
