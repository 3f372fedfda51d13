"""Tiles are chosen by the shapes alone: nothing is timed, and no number of images brings a kernel of its own."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.autotuner import Autotuner

import parrot_kernels
from parrot_kernels import attention_tiles, compile_only, tile_choice
from parrot_kernels.grouped_gemm import tiles
from parrot_kernels.tile_choice import attention_cost, cheapest, product_cost, product_tile

PROGRAM = Path(__file__).with_name("launch_keys.py")
WIDE, NARROW = product_tile(128, 256, 64, warps=8, stages=3), product_tile(128, 128, 64, warps=8, stages=4)


def test_numbers_of_images_neither_time_nor_compile_anything_new() -> None:
    """One image, numbers that 16 divides and others, few and many (tensors of more than 2**31 elements).

    The launchers run as on a GPU, on meta tensors.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), "2", "1", "3", "16", "577", "5000"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first: dict[str, list[str]] = {}
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        assert row["kernels"], row["name"]
        known = first.setdefault(row["name"], row["kernels"])
        assert row["kernels"] == known, f"{row['name']} with {row['number']}"
    assert len(rows) == 6 * len(first)


def count_of(rows: int, columns: int) -> Callable[[tile_choice.Tile], int]:
    return lambda tile: triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"])


@given(st.integers(1, 10**6), st.integers(1, 2**15), st.integers(1, 2**15), st.sampled_from([78, 114, 132, 144]))
def test_choice_is_a_function_of_shapes_and_no_other_tile_costs_less(
    rows: int, columns: int, depth: int, processors: int
) -> None:
    count = count_of(rows, columns)

    def cost(tile: tile_choice.Tile) -> float:
        return product_cost(tile, count(tile), depth, processors)

    chosen = cheapest((WIDE, NARROW), cost)
    assert chosen is cheapest((WIDE, NARROW), cost)
    assert all(cost(chosen) <= cost(other) for other in (WIDE, NARROW))
    # A wave that is full and one that holds a single tile last equally long.
    waves = triton.cdiv(count(chosen), processors)
    assert cost(chosen) == pytest.approx(waves * product_cost(chosen, 1, depth, processors))


@pytest.mark.parametrize(
    ("rows", "columns", "wanted"),
    [
        (577, 4096, WIDE),  # 80 wide tiles in one wave; 160 narrow ones would take two
        (577 * 4, 4096, WIDE),  # 304 wide tiles in three waves, 608 narrow ones in five that are not short enough
        (577 * 3, 4096, WIDE),  # 224 wide tiles in two waves, 448 narrow ones in four
        (64, 8192, NARROW),  # 64 narrow tiles at the same time, where wide ones leave processors without work
        (10**6, 4096, WIDE),  # many waves: the tile that reads less for each product
    ],
)
def test_waves_decide(rows: int, columns: int, wanted: tile_choice.Tile) -> None:
    count = count_of(rows, columns)
    assert cheapest((WIDE, NARROW), lambda tile: product_cost(tile, count(tile), 6 * 4096, 132)) is wanted


def test_length_decides_in_attention() -> None:
    small, large = (tile_choice.Tile(sizes={"M": m, "N": 64}, warps=8) for m in (64, 128))

    def choice(length: int) -> tile_choice.Tile:
        return cheapest((large, small), lambda tile: attention_cost(tile, "M", length, "N", length, 32, 128, 132))

    assert choice(128) is small  # 64 programs for 132 processors, where large tiles make 32
    assert choice(4096) is large


def test_launches_of_attention_choose_by_both_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (tile_choice.Tile(sizes={"M": m, "N": 64}, warps=8) for m in (64, 128))
    chosen: list[tile_choice.Tile] = []
    monkeypatch.setattr(attention_tiles, "launch", lambda kernel, grid, tile, tiles: chosen.append(tile))
    monkeypatch.setattr(attention_tiles.triton_support, "num_processors", lambda device: 132)
    query = torch.empty(1, 32, 64, dtype=torch.bfloat16, device="meta")
    for rows, keys in ((128, 128), (4096, 4096), (128, 4096)):
        attention_tiles.by_rows(None, {64: (large, small)}, query, rows, keys, 32)
    assert chosen == [small, large, small]


def test_no_kernel_is_autotuned() -> None:
    """What was timed at one size, or beside other programs, could come back for another through Triton's cache."""
    kernels = [
        (f"{name}.{attribute}", value)
        for name in (found.name for found in pkgutil.walk_packages(parrot_kernels.__path__, "parrot_kernels."))
        if name.endswith(("triton_impl", "kernels", "tiles"))
        for attribute, value in vars(importlib.import_module(name)).items()
        if hasattr(value, "fn")
    ]
    assert len(kernels) > 30
    assert [name for name, value in kernels if isinstance(value, Autotuner)] == []


@given(st.integers(1, 10**5), st.integers(1, 256), st.sampled_from([64, 128]))
def test_ragged_blocks_are_between_full_and_one_cut_in_each_group(rows: int, groups: int, block: int) -> None:
    expected = tile_choice.ragged_blocks(rows, groups, rows, block)
    assert triton.cdiv(rows, block) <= expected <= rows // block + min(groups, rows) + 1


@triton.jit
def _corner_kernel(ptr, out_ptr, height, width, BLOCK: tl.constexpr):
    """Of plane 1, the last rows and columns."""
    desc = tiles.plane_descriptor(ptr, 2, height, width, BLOCK, BLOCK)
    corner = tiles.load_plane(desc, 1, height - BLOCK, width - BLOCK, BLOCK, BLOCK)
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + at, corner)


@pytest.mark.skipif(not tiles.triton_support.INTERPRETING, reason="the matrix of 8.6 GB is a file with a hole")
def test_planes_of_more_than_2_to_31_elements(tmp_path: Path) -> None:
    height, width, block = 2**15 + 16, 2**16, 16
    file = tmp_path / "matrix"
    with file.open("wb") as handle:
        handle.truncate(2 * 2 * height * width)
    matrix = torch.from_file(str(file), shared=True, size=2 * height * width, dtype=torch.float16)
    corner = torch.arange(block * block, dtype=torch.float16).view(block, block)
    matrix.view(2, height, width)[1, -block:, -block:] = corner
    out = torch.empty(block, block, dtype=torch.float16)
    _corner_kernel[(1,)](matrix, out, height, width, BLOCK=block)
    assert torch.equal(out, corner)


DESCRIPTORS = """
    %row = arith.extsi %K : i32 to i64 loc(#loc1)
    %high = arith.extsi %rows : i32 to i64 loc(#loc1)
    %good = arith.muli %high, %row : i64 loc(#loc1)
    %small = arith.muli %rows, %K : i32 loc(#loc1)
    %bad = arith.extsi %small : i32 to i64 loc(#loc1)
    %a = tt.make_tensor_descriptor %ptr, [%n, %rows, %K], [%STRIDE, %row, %c1_i64] : <bf16>, <tensor<1x16x16xbf16>>
"""


@pytest.mark.parametrize(("stride", "count"), [("good", 0), ("bad", 1)])
def test_products_of_32_bits_in_strides_are_found(stride: str, count: int) -> None:
    assert compile_only.narrow_strides(DESCRIPTORS.replace("STRIDE", stride)) == count
