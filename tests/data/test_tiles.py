"""Pictures cut into tiles: pixels and rows against transformers' LLaVA-NeXT, and the same rows wherever they count."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from parrot_sys.data.check import CheckSetup, check_files
from parrot_sys.data.config import DataConfig
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.decoding import image_size, load_image
from parrot_sys.data.feature_store import FeatureStore, tile_keys
from parrot_sys.data.images import ImageProcessor
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.packing import Sample, expanded_lengths, pack_samples, remaining_labels, rows_of_pictures
from parrot_sys.data.picture import join_pictures
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import CheckpointError, ConfigError, DataError
from parrot_sys.inference.inputs import split_batch
from parrot_sys.towers import NEWLINE, Tiling

RELEASED = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SMALL = Tiling(resolutions=((56, 56), (56, 112), (112, 56), (112, 112), (56, 168)), tile=56, side=4)
SIZES = st.tuples(st.integers(1, 700), st.integers(1, 700)).filter(lambda size: max(size) <= 20 * min(size))


def of_transformers(tiling, size):
    """transformers' own packing of features that are their own numbers, and NEWLINE."""
    vision = SimpleNamespace(image_size=tiling.tile, patch_size=tiling.tile // tiling.side)
    pinpoints = [list(resolution) for resolution in tiling.resolutions]
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    tiles = image_size_to_num_patches(size, pinpoints, tiling.tile)
    features = torch.arange(tiles * tiling.side**2, dtype=torch.float64).reshape(tiles, -1, 1)
    newline = torch.tensor([float(NEWLINE)], dtype=torch.float64)
    packed, _ = LlavaNextModel.pack_image_features(model, [features], [size], "default", newline)
    return tiles, packed[0][:, 0].long().tolist()


@given(size=SIZES, tiling=st.sampled_from([SMALL, Tiling(resolutions=RELEASED, tile=336, side=24)]))
@settings(max_examples=150, deadline=None)
def test_tiles_and_rows_of_every_size_are_those_of_transformers(size, tiling):
    rows = tiling.rows(*size)
    assert (rows.tiles, rows.source.tolist()) == of_transformers(tiling, size)
    processor = SimpleNamespace(
        patch_size=tiling.tile // tiling.side,
        num_additional_image_tokens=0,
        image_processor=SimpleNamespace(image_grid_pinpoints=[list(each) for each in tiling.resolutions]),
    )
    processor._get_unpadded_features = lambda *sizes: LlavaNextProcessor._get_unpadded_features(processor, *sizes)
    counted = LlavaNextProcessor._get_number_of_features(processor, *size, tiling.tile, tiling.tile)
    assert len(rows.source) == counted


@given(size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
@settings(max_examples=60, deadline=None)
def test_a_picture_so_thin_that_transformers_finds_no_resolution_still_has_rows(size):
    rows, (height, width) = SMALL.rows(*size), SMALL.resolution(*size)
    assert (height, width) in SMALL.resolutions
    assert rows.tiles == 1 + height * width // SMALL.tile**2
    assert rows.source[: SMALL.side**2].tolist() == list(range(SMALL.side**2))
    assert rows.source.max() < rows.tiles * SMALL.side**2
    assert all(1 <= inner <= outer for inner, outer in zip(SMALL.resized(*size), (height, width), strict=True))


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor_of(tile=56):
    return ImageProcessor.from_dict(ImageProcessor.for_tower("clip", tile).to_dict(), image_aspect_ratio="square")


@given(size=st.tuples(st.integers(3, 260), st.integers(3, 260)))
@settings(max_examples=25, deadline=None)
def test_pixels_are_those_of_transformers_bit_by_bit(size):
    assume(max(size) <= 20 * min(size))
    image = noise(*size)
    reference = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=[list(resolution) for resolution in SMALL.resolutions],
    )
    wanted = reference(image, return_tensors="np")
    pixels, found = processor_of().tiles(image, SMALL)
    assert np.array_equal(pixels, wanted["pixel_values"][0])
    assert found == size == tuple(wanted["image_sizes"][0])
    assert len(pixels) == SMALL.rows(*size).tiles


def test_the_size_in_a_header_is_that_of_the_turned_picture(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        path = tmp_path / f"{orientation}.jpg"
        noise(30, 50).save(path, exif=exif)
        for rule in ("apply", "ignore"):
            seen = load_image(path, exif=rule)
            assert image_size(path, exif=rule) == (seen.height, seen.width)


@pytest.mark.parametrize("resolutions", [(), ((56, 50),), ((0, 56),)])
def test_resolutions_that_are_no_tiles_are_refused(resolutions):
    with pytest.raises(ConfigError, match="resolutions of tiles must be"):
        Tiling(resolutions=resolutions, tile=56, side=4)


def sample_of(sizes, ids, labels):
    """Tiles whose pixels all are the number of the tile, from 1."""
    rows = tuple(SMALL.rows(*size) for size in sizes)
    tiles = torch.arange(1.0, 1 + sum(each.tiles for each in rows))
    pixels = tiles[:, None, None, None].expand(-1, 3, 1, 1) if rows else None
    return Sample(input_ids=ids, labels=labels, pixel_values=pixels, pictures=rows or None)


@st.composite
def tiled_samples(draw):
    content = draw(st.lists(st.one_of(st.none(), SIZES), min_size=1, max_size=5))
    ids = [7 if size is None else IMAGE_TOKEN_ID for size in content]
    labels = [7 if token == 7 and draw(st.booleans()) else IGNORE_ID for token in ids]
    return sample_of([size for size in content if size is not None], ids, labels)


@given(samples=st.lists(tiled_samples(), min_size=1, max_size=3), limit=st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_a_batch_has_the_rows_of_its_pictures_in_order_and_newlines_after_all_features(samples, limit):
    visual = SMALL.side**2
    batch = pack_samples(samples, num_visual_rows=visual, max_seq_len=limit)
    wanted, first, lengths = [], 0, []
    for sample in samples:
        rows, start, pictures = [], 0, iter(sample.pictures or ())
        for token in sample.input_ids[:limit]:
            own = [(None, None)]
            if token == IMAGE_TOKEN_ID:
                picture = next(pictures)
                own = [(start, int(source)) for source in picture.source]
                start += picture.tiles
            rows += own
        rows = rows[:limit]
        lengths.append(len(rows))
        kept = [(tile, source) for tile, source in rows if tile is not None]
        wanted += [NEWLINE if source == NEWLINE else (first + tile) * visual + source for tile, source in kept]
        started = {tile for tile, _ in kept}
        counts, place = 0, 0
        for picture in sample.pictures or ():
            counts += picture.tiles if place in started else 0
            place += picture.tiles
        first += counts
        full = expanded_lengths(np.array(sample.input_ids), rows_of_pictures(sample, visual), limit)
        assert full[0] == len(rows)
    assert batch.cu_seqlens.diff().tolist() == lengths
    assert batch.num_images == first == (0 if batch.pixel_values is None else len(batch.pixel_values))
    newline = first * visual
    assert batch.visual_source.tolist() == [newline if source == NEWLINE else source for source in wanted]
    assert (batch.input_ids[batch.visual_rows] == IMAGE_TOKEN_ID).all()
    labels = sum(
        remaining_labels(np.array(s.input_ids), np.array(s.labels), rows_of_pictures(s, visual), limit) for s in samples
    )
    assert batch.label_rows.numel() == labels


def test_tiles_that_do_not_fit_the_markers_are_refused():
    sample = sample_of([(56, 112)], [IMAGE_TOKEN_ID], [IGNORE_ID])
    with pytest.raises(DataError, match="one picture for each of its 0 markers"):
        pack_samples([replace(sample, input_ids=[1])], num_visual_rows=16)
    with pytest.raises(DataError, match="must have 3 tiles for the pictures of its 1 markers, got 2"):
        pack_samples(
            [Sample(input_ids=[IMAGE_TOKEN_ID], pixel_values=sample.pixel_values[:2], pictures=sample.pictures)],
            num_visual_rows=16,
        )


@pytest.fixture
def tiled(processor):
    return processor.with_tiling(SMALL)


@pytest.fixture
def records(tmp_path, turns, write_records):
    """Pictures of many proportions, some turned by their EXIF orientation; records with none, one and several."""
    shapes = [(40, 90), (90, 40), (130, 120), (30, 200), (56, 56), (300, 20)]
    for i, shape in enumerate(shapes):
        exif = Image.Exif()
        exif[0x112] = 6 if i % 2 else 1
        noise(*shape, seed=i).save(tmp_path / f"p{i}.jpg", exif=exif)
    contents = []
    for i, numbers in enumerate([[], [0], [1, 2], [3], [4, 5], [5]]):
        names = [f"p{number}.jpg" for number in numbers]
        question = "<image>\n" * len(names) + "What?"
        contents.append({"id": f"r{i}", "image": names or None, "conversations": turns(question, f"A {i}.")})
    return write_records(contents)


def loader_of(path, processor, limit=2048, **settings):
    return ParrotDataLoader(
        DataConfig(paths=(path,), **settings),
        processor,
        num_visual_rows=16,
        max_seq_len=limit,
        needs_labels=False,
        global_batch_size=3,
    )


def rows_by_record(loader):
    return {
        name: int(rows)
        for step in loader
        for batch in step
        for name, rows in zip(batch.record_ids, batch.cu_seqlens.diff(), strict=True)
    }


def test_lengths_are_counted_from_headers_as_batches_have_them(records, tiled, tmp_path):
    for limit in (2048, 60):
        loader = loader_of(records, tiled, limit, cache_dir=str(tmp_path / "cache"))
        (dataset,) = loader.datasets
        counted = {
            f"set:{r.record_id}": int(n) for r, n in zip(dataset.read(range(len(dataset))), dataset.rows, strict=True)
        }
        assert rows_by_record(loader) == counted
        data = DataConfig(paths=(records,))
        setup = CheckSetup(
            data=data,
            processor=tiled.with_data_config(data),
            num_visual_rows=16,
            max_seq_len=limit,
            vocab_size=10**6,
            pictures="skip",
        )
        (report,) = check_files(setup).files
        assert sum(report.rows.values()) == report.records == 6
        assert sorted(min(n, limit) for n in report.rows.elements()) == sorted(counted.values())


def test_a_picture_of_another_size_is_counted_anew_in_spite_of_the_cache(records, tiled, tmp_path):
    before = rows_by_record(loader_of(records, tiled, cache_dir=str(tmp_path / "cache")))
    noise(90, 40).save(tmp_path / "p0.jpg")
    loader = loader_of(records, tiled, cache_dir=str(tmp_path / "cache"))
    after = rows_by_record(loader)
    assert {name for name in before if before[name] != after[name]} == {"set:r1"}
    assert sorted(after.values()) == sorted(loader.datasets[0].rows.tolist())


def test_a_picture_without_a_header_is_a_bad_sample(records, tiled, tmp_path):
    (tmp_path / "p0.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"r1.*p0\.jpg cannot be read"):
        loader_of(records, tiled)
    loader = loader_of(records, tiled, on_bad_sample="skip")
    assert len(loader.datasets[0]) == 5


def test_features_from_a_store_make_the_same_batches_as_pixels(records, tiled, tmp_path):
    loader = loader_of(records, tiled)
    store = FeatureStore(tmp_path / "features", "tower")
    for picture in loader.pictures().values():
        (image,) = tiled.with_data_config(loader.config).pictures([picture])
        features = image.pixel_values.mean((1, 2, 3))[:, None, None].expand(-1, 16, 2)
        store.write(tile_keys(store.keys([picture]), [len(features)]), features)
    plain = [batch for step in loader_of(records, tiled) for batch in step]
    loader.use_features(store)
    for want, got in zip(plain, [batch for step in loader for batch in step], strict=True):
        assert torch.equal(want.visual_source, got.visual_source)
        assert want.num_images == got.num_images
        if want.pixel_values is not None:
            assert torch.equal(want.pixel_values.mean((1, 2, 3)), got.image_features[:, 0, 0])


def test_pictures_go_from_the_processor_to_samples(tiled):
    pictures = tiled.pictures([noise(40, 90), noise(90, 40), noise(10, 10)])
    ids = torch.tensor([[IMAGE_TOKEN_ID, 5, 6], [IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 7]])
    first, second = split_batch(ids, images=pictures)
    assert torch.equal(first.pixel_values, pictures[0].pixel_values)
    assert (second.pixel_values is not None, second.pictures) == (True, (pictures[1].rows, pictures[2].rows))
    assert join_pictures([])[1] is None
    with pytest.raises(DataError, match="as many pictures as the 3 image markers"):
        split_batch(ids, images=pictures[:2])
    with pytest.raises(ConfigError, match=r"use processor\.pictures"):
        tiled.images([noise(4, 4)])


def test_files_of_transformers_bring_their_tiles(processor, tmp_path):
    pinpoints = [list(resolution) for resolution in SMALL.resolutions]
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    reference = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=pinpoints)
    reference.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    vision = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
    config = {"model_type": "llava_next", "vision_config": vision, "image_grid_pinpoints": pinpoints}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = ParrotProcessor.from_pretrained(tmp_path)
    assert read.tiling == SMALL
    image = noise(40, 100)
    (picture,) = read.pictures([image])
    assert np.array_equal(picture.pixel_values.numpy(), reference(image, return_tensors="np")["pixel_values"][0])
    assert len(picture.rows.source) == len(SMALL.rows(40, 100).source)


def test_a_processor_keeps_its_tiles_and_one_of_another_model_is_refused(tiled, processor, tmp_path):
    tiled.save_pretrained(tmp_path)
    again = ParrotProcessor.from_pretrained(tmp_path)
    assert again.tiling == SMALL
    side = again.image_processor.height
    again.check_fits(10**6, side, tmp_path, tiling=SMALL)
    with pytest.raises(CheckpointError, match="cuts pictures into tiles by"):
        again.check_fits(10**6, side, tmp_path)
    settings_file = tmp_path / "preprocessor_config.json"
    stored = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps(stored | {"image_grid_pinpoints": [[56, 5]]}))
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json.*multiples of the 56 pixels"):
        ParrotProcessor.from_pretrained(tmp_path)
