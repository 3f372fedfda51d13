"""DiskCache: what comes out is what was put in, and the folder never holds more than its limit."""

from __future__ import annotations

import contextlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.remote.cache import DiskCache


def key(number):
    return f"{number:064x}"[::-1]


def held(folder):
    total = 0
    for path in Path(folder).glob("??/*"):
        with contextlib.suppress(FileNotFoundError):  # another process has deleted it
            total += path.stat().st_size
    return total


STEP = st.tuples(st.sampled_from(["put", "get", "damage", "other process", "kill"]), st.integers(0, 9))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(limit=st.integers(0, 400), steps=st.lists(STEP, max_size=40), sizes=st.lists(st.integers(0, 150), min_size=10))
def test_it_holds_what_was_put_in_and_no_more_than_the_limit(limit, steps, sizes):
    with tempfile.TemporaryDirectory() as folder:
        cache, versions = DiskCache(folder, limit), {}
        for count, (step, number) in enumerate(steps):
            path = Path(folder) / key(number)[:2] / key(number)
            if step == "put":
                versions[number] = os.urandom(sizes[number])
                cache.put(key(number), versions[number])
                if sizes[number] + 4 <= limit:
                    assert cache.get(key(number)) == versions[number]
            elif step == "get":
                assert cache.get(key(number)) in (None, versions.get(number))
            elif step == "damage" and path.exists():
                path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1 + count % 5]))
                assert cache.get(key(number)) is None
                assert not path.exists()
            elif step == "kill" and path.exists():  # a writer that was killed leaves a part of a file
                path.with_name(path.name + ".tmp").write_bytes(b"x" * 9)
            else:
                cache = DiskCache(folder, limit)
            partial = sum(each.stat().st_size for each in Path(folder).glob("??/*.tmp"))
            assert held(folder) - partial <= limit


def test_what_was_not_read_for_the_longest_time_goes_first(tmp_path):
    cache = DiskCache(tmp_path, 10 * 104)
    for number in range(10):
        cache.put(key(number), bytes(100))
        os.utime(tmp_path / key(number)[:2] / key(number), ns=(number, number))
    assert cache.get(key(0)) == bytes(100)  # read just now
    cache.put(key(10), bytes(100))
    assert [number for number in range(11) if cache.get(key(number)) is None] == [1, 2]


def _fill(arguments):
    folder, first = arguments
    cache = DiskCache(folder, 5000)
    most = 0
    for number in range(first, first + 60):
        cache.put(key(number % 80), bytes([number % 80]) * 300)
        assert cache.get(key(number % 80)) in (None, bytes([number % 80]) * 300)
        most = max(most, held(folder))
    return most


def test_processes_share_the_limit(tmp_path):
    pids = []
    for first in (0, 20):
        if not (pid := os.fork()):
            code = 1
            try:
                with ThreadPoolExecutor(2) as threads:
                    most = max(threads.map(_fill, [(tmp_path, first), (tmp_path, first + 40)]))
                code = 0 if most <= 5000 + 304 * 4 else 2  # (files may come and go while they are counted)
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert held(tmp_path) <= 5000


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file", 1000)
    for _ in range(2):
        cache.put(key(1), b"x")
        assert cache.get(key(1)) is None
    assert caplog.text.count("remote files cannot be kept in") == 1
