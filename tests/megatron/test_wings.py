"""Learners, routers and their memory against a plain model with whole matrices, in shapes that no fixture has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parrot_sys.data.packing import Sample, pack_samples
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime.initialize import initialize, shutdown
from parrot_sys.modules.rotary import RopeScaling
from parrot_sys.systems.build import build_model, config_of
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.export import released_tensors
from tests.comparisons import differ
from tests.megatron.pages import Pages, prompts, step_batch
from tests.megatron.wings_models import QWEN, assert_close, build
from tests.megatron.wings_reference import Sequence, WingsReference

LLAMA = replace(
    QWEN,
    wings=replace(QWEN.wings, layers=(0, 2)),
    llm=replace(
        QWEN.llm,
        qkv_bias=False,
        rope_base=500.0,
        rope_scaling=RopeScaling(factor=4.0, original_positions=32),
        tie_word_embeddings=True,
    ),
)
V, IMAGE = 4, -200
# Where the images stand among how many text ids.
ONE, LATE, TWO, TEXT, SHORT = (12, (5,)), (9, (8,)), (14, (4, 9)), (17, ()), (6, (4,))


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


def make(shapes: tuple[tuple[int, tuple[int, ...]], ...], seed: int = 5) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for count, places in shapes:
        ids = torch.randint(0, 53, (count,), generator=generator).tolist()
        for place in reversed(places):
            ids.insert(place, IMAGE)
        pixels = torch.randn(len(places), 3, 28, 28, generator=generator)
        samples.append(Sample(input_ids=torch.tensor(ids), pixel_values=pixels if places else None))
    return samples


def run(model: MultimodalModel, samples: list[Sample]) -> list[Tensor]:
    batch = pack_samples(samples, num_visual_rows=V)
    with torch.no_grad():
        return list(model(batch, mode="logits").logits.split(batch.cu_seqlens.diff().tolist()))


def reference(model: MultimodalModel, samples: list[Sample]) -> list[Tensor]:
    with torch.no_grad():

        def rows(pixels: Tensor) -> Tensor:
            return model.projector(model.vision_tower(pixels)).flatten(0, 1)

        sequences = [
            Sequence(
                ids=sample.input_ids.repeat_interleave(torch.where(sample.input_ids < 0, V, 1)),
                visual=torch.empty(0, 24) if sample.pixel_values is None else rows(sample.pixel_values),
            )
            for sample in samples
        ]
        plain = WingsReference(dict(released_tensors(model)), config_of(model), rows(torch.zeros(1, 3, 28, 28)))
        return plain.logits(sequences)


@pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["qwen", "llama"])
@pytest.mark.parametrize(
    "shapes",
    [(ONE,), (TWO,), (TEXT,), (ONE, TEXT, TWO), (TEXT, SHORT, LATE, TEXT)],
    ids=["one-image", "two-images", "text", "mixed", "mixed-with-text-first"],
)
def test_papers_rule(config: ParrotConfig, shapes: tuple[tuple[int, tuple[int, ...]], ...]) -> None:
    model, samples = build(config), make(shapes)
    assert_close(run(model, samples), reference(model, samples))


@pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["qwen", "llama"])
@pytest.mark.parametrize(
    "shapes",
    [(ONE,), (ONE, SHORT, LATE), (TEXT,), (TEXT, SHORT), (ONE, (7, ()), LATE, TEXT), ((3, ()), (5, ()))],
    ids=["one-image", "images", "text", "mixed", "mixed-more", "short-texts"],
)
def test_released_rule(config: ParrotConfig, shapes: tuple[tuple[int, tuple[int, ...]], ...]) -> None:
    model, samples = build(config.with_compat("released")), make(shapes)
    assert_close(run(model, samples), reference(model, samples))


def test_no_row_reads_a_later_one_and_samples_do_not_meet() -> None:
    model, samples = build(QWEN), make((TWO, TEXT, ONE))
    wanted = run(model, samples)
    changed = [
        replace(samples[0], input_ids=torch.cat((samples[0].input_ids[:-2], torch.tensor([1, 2])))),
        *samples[1:],
    ]
    got = run(model, changed)
    assert torch.equal(got[0][:-2], wanted[0][:-2])
    assert differ(got[0][-1], wanted[0][-1])
    assert_close(got[1:], wanted[1:])
    assert_close(run(model, samples[:1]), wanted[:1])


def test_new_learners_add_nothing() -> None:
    torch.manual_seed(3)
    model, samples = build_model(QWEN), make((ONE, TEXT))
    torch.manual_seed(3)
    plain = build_model(replace(QWEN, wings=None))
    state = model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert_close(run(model, samples), run(plain, samples))


def test_router_weights_sum_to_one() -> None:
    model, batch = build(LLAMA), pack_samples(make((ONE, TEXT)), num_visual_rows=V)
    with torch.no_grad():
        weights = model(batch, mode="logits", output_router_weights=True).router_weights
    assert sorted(weights) == [1, 3]
    for each in weights.values():
        assert each.shape == (batch.num_rows, 2)
        torch.testing.assert_close(each.sum(1), torch.ones(batch.num_rows))


def test_cached_decoding_is_whole_decoding() -> None:
    model, samples = build(LLAMA), make((ONE, TEXT, TWO))
    batch = pack_samples(samples, num_visual_rows=V)
    steps = torch.tensor([[7, 8, 9, 10], [1, 2, 3, 4], [50, 51, 52, 0]])
    with torch.no_grad():
        pages, prompt, rows = prompts(model, batch, 4)
        model(prompt, mode="logits", logits_rows=batch.cu_seqlens[1:].long() - 1, paged=rows)
        kept = [2, 0]
        for step in range(4):
            if step == 2:
                pages.keep(kept)
            tokens = steps[:, step] if step < 2 else steps[kept, step]
            one = step_batch(tokens, pages.lengths)
            logits = model(one, mode="logits", paged=pages.rows([1] * len(tokens))).logits
    longer = [replace(s, input_ids=torch.cat((s.input_ids, steps[i]))) for i, s in enumerate(samples)]
    assert_close(list(logits), [run(model, longer)[place][-1] for place in kept])


def test_refusals() -> None:
    model = build(QWEN)
    assert QWEN.max_rows == 48, "so that answers end in time"
    with pytest.raises(DataError, match="at most 48 rows"):
        run(model, make(((49, ()),)))
    batch = pack_samples(make((ONE,)), num_visual_rows=V)
    released = build(QWEN.with_compat("released"))
    with pytest.raises(ConfigError, match="use_cache=False"):
        released(batch, mode="logits", paged=Pages(1, 40).rows([batch.num_rows]))
    with pytest.raises(ConfigError, match=r"model.wings.layers must be in 0 .. 2"):
        replace(QWEN, wings=replace(QWEN.wings, layers=(1, 3)))


def test_stage_one_file_has_no_routers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from parrot_sys.models.tensor_files import TensorFiles
    from parrot_sys.systems.export import export_released
    from parrot_sys.systems.hf_config import config_from_hf, read_json
    from parrot_sys.systems.load import bypassed_parts, load_released

    model = build(LLAMA)
    export_released(model, tmp_path / "model")
    config = config_from_hf(read_json(tmp_path / "model" / "config.json"), tmp_path / "model")
    assert config == LLAMA
    with TensorFiles(tmp_path / "model") as files:
        tensors = {name: files.tensor(name) for name in files.names() if "reweight_module" not in name}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert bypassed_parts(tmp_path / "model", LLAMA) == {"textual_learners"}
    loaded, first = (build_model(LLAMA, bypass=("textual_learners",)) for _ in range(2))
    load_released(loaded, tmp_path / "model")
    first.load_state_dict(model.state_dict())
    samples = make((ONE, TEXT))
    assert_close(run(loaded, samples), run(first, samples))
