"""Mixes: weights of sets and languages, temperature, caps, and mixes that change at given steps."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.cli import parse_config
from parrot_sys.config_values import config_to_dict, load_config
from parrot_sys.data.config import DataConfig
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.mix_config import Mix, MixStage
from parrot_sys.data.mixture import Group, SampleOrder, epoch_order, mixed
from parrot_sys.errors import ConfigError, DataError
from tests.data.comparing import record

SETS, LANGUAGES = ("a", "b"), ("en", "zh", "")
WEIGHTS = st.sampled_from([0.0, 0.25, 1.0, 2.5])


def mix_of(**values):
    return Mix(**({"weights": {}, "language_weights": {}, "caps": {}, "language_caps": {}} | values))


@st.composite
def group_lists(draw):
    """Groups of two sets in three languages, numbered through."""
    groups, start = [], 0
    for name in SETS:
        for language in LANGUAGES:
            size = draw(st.integers(0, 40))
            groups.append(Group(np.arange(start, start + size), 1.0, False, name, language))
            start += size
    return groups


MIXES = st.builds(
    mix_of,
    weights=st.dictionaries(st.sampled_from(SETS), WEIGHTS),
    language_weights=st.dictionaries(st.sampled_from([*LANGUAGES, "a/en", "b/zh"]), WEIGHTS),
    alpha=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    caps=st.dictionaries(st.sampled_from(SETS), st.integers(0, 60)),
    language_caps=st.dictionaries(st.sampled_from(LANGUAGES), st.integers(0, 60)),
)


def total(groups, **labels):
    return sum(g.count for g in groups if all(getattr(g, name) == value for name, value in labels.items()))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(groups=group_lists(), mix=MIXES)
def test_counts_follow_from_weights_temperature_and_caps(groups, mix):
    free = mixed(groups, mix_of(weights=mix.weights, language_weights=mix.language_weights))
    for group in free:
        pair = mix.language_weights.get(f"{group.data_set}/{group.language}")
        language = mix.language_weights.get(group.language, 1.0) if pair is None else pair
        assert group.weight == mix.weights.get(group.data_set, 1.0) * language
    tempered = mixed(groups, mix_of(weights=mix.weights, language_weights=mix.language_weights, alpha=mix.alpha))
    sizes = {language: sum(g.weight * len(g.samples) for g in free if g.language == language) for language in LANGUAGES}
    there = {language: size for language, size in sizes.items() if size}
    if there:
        shares = {language: size**mix.alpha for language, size in there.items()}
        for language, size in there.items():
            wanted = sum(there.values()) * shares[language] / sum(shares.values())
            assert abs(total(tempered, language=language) - wanted) <= len(SETS) / 2 + 1e-6
            # Within a language the sets keep their proportions.
            own = {
                g.weight / f.weight for f, g in zip(free, tempered, strict=True) if g.language == language and f.weight
            }
            assert max(own) - min(own) < 1e-9 * max(own)
            assert size > 0
    capped = mixed(groups, mix)
    for name in SETS:
        before = total(tempered, data_set=name)
        if (cap := mix.caps.get(name)) is not None:
            assert total(capped, data_set=name) <= cap
            if not mix.language_caps:
                assert total(capped, data_set=name) == min(cap, before)
                for old, new in zip(tempered, capped, strict=True):
                    if old.data_set == name and before > cap:
                        assert abs(new.count - old.count * cap / before) < 1
        elif not mix.language_caps:
            assert total(capped, data_set=name) == before
    for language, cap in mix.language_caps.items():
        assert total(capped, language=language) <= cap
    if not mix.caps and not mix.language_caps:
        assert [g.weight for g in capped] == [g.weight for g in tempered]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=group_lists().filter(lambda groups: len(groups[0].samples) > 0),
    starts=st.lists(st.integers(1, 150), max_size=3, unique=True).map(sorted),
    seed=st.integers(0, 5),
    cuts=st.lists(st.integers(0, 250), max_size=4),
)
def test_each_stage_is_whole_rounds_of_its_own_mix_one_after_the_other(groups, starts, seed, cuts):
    mixes = [mix_of(weights={"b": i % 2}, language_weights={"zh": 0.5 * i}) for i in range(len(starts) + 1)]
    stages = [(start, mixed(groups, mix)) for start, mix in zip([0, *starts], mixes, strict=True)]
    order = SampleOrder(stages, seed, None)
    line = np.concatenate([order.epoch(i) for i in range(-(-260 // len(order)))])
    assert all(len(order.epoch(i)) == len(order) for i in range(3))
    for number, (start, own) in enumerate(stages):
        end = min([*starts[number : number + 1], len(line)])
        at = start
        for round_number in range(300):
            wanted = epoch_order(own, seed, round_number, None, number)[: max(end - at, 0)]
            if not len(wanted):
                break
            assert line[at : at + len(wanted)].tolist() == wanted.tolist()
            at += len(wanted)
    if not starts:
        assert order.epoch(2).tolist() == epoch_order(stages[0][1], seed, 2).tolist()


@pytest.fixture
def sets(tmp_path):
    """12 records in en and 4 in zh; 6 records in pt."""
    big = [{**record(i, []), "lang": "en" if i < 12 else "zh"} for i in range(16)]
    small = [{**record(i, []), "lang": "pt"} for i in range(6)]
    for name, records in (("big", big), ("small", small)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return str(tmp_path / "big.json"), str(tmp_path / "small.json")


def make_loader(processor, paths, batch=4, rank=0, ranks=1, **values):
    return ParrotDataLoader(
        DataConfig(paths=paths, **values),
        processor,
        num_visual_rows=17,
        max_seq_len=512,
        global_batch_size=batch,
        dp_rank=rank,
        dp_size=ranks,
    )


def flat(steps):
    return [name for step in steps for name in step]


def names(step):
    return sorted(name for batch in step for name in batch.record_ids)


CURRICULUM = (
    MixStage(from_step=3, weights=(0.0, 2.0)),
    MixStage(from_step=8, language_alpha=0.0, language_caps={"en": 3}),
)


def steps_of(loader, count):
    steps = []
    while len(steps) < count:
        for step in loader:
            steps.append(names(step))
            if len(steps) == count:
                break
    return steps


def test_a_curriculum_changes_the_mix_at_its_steps(processor, sets):
    steps = steps_of(make_loader(processor, sets, curriculum=CURRICULUM), 14)
    plain = steps_of(make_loader(processor, sets), 3)
    assert steps[:3] == plain
    assert {name.split(":")[0] for step in steps[3:8] for name in step} == {"small"}
    last = Counter(name for step in steps[8:] for name in step)
    assert sum(count for name, count in last.items() if name in [f"big:r{i}" for i in range(12)]) <= 2 * 3
    assert any(name.startswith("big:") for name in last)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_curriculum_depends_on_no_ranks_and_resumes(processor, sets, ranks):
    wanted = steps_of(make_loader(processor, sets, curriculum=CURRICULUM), 12)
    parts = [
        steps_of(make_loader(processor, sets, rank=rank, ranks=ranks, curriculum=CURRICULUM), 12)
        for rank in range(ranks)
    ]
    assert [sorted(flat(step)) for step in zip(*parts, strict=True)] == wanted
    for stop in (1, 5, 6, 9):
        loader = make_loader(processor, sets, curriculum=CURRICULUM)
        assert steps_of(loader, stop) == wanted[:stop]
        again = make_loader(processor, sets, rank=0, ranks=1, curriculum=CURRICULUM)
        again.load_state_dict(loader.state_dict())
        assert steps_of(again, 12 - stop) == wanted[stop:]


def test_another_batch_size_moves_no_stage(processor, sets):
    """Steps of a curriculum are those of the batch size that the run began with."""
    wanted = flat(steps_of(make_loader(processor, sets, curriculum=CURRICULUM), 12))
    loader = make_loader(processor, sets, curriculum=CURRICULUM)
    seen = flat(steps_of(loader, 2))
    again = make_loader(processor, sets, batch=2, curriculum=CURRICULUM)
    again.load_state_dict(loader.state_dict())
    seen += flat(steps_of(again, 15))
    assert len(seen) == 38  # ends with a step of both
    assert sorted(seen) == sorted(wanted[:38])
    twice = make_loader(processor, sets, batch=3, curriculum=CURRICULUM)
    twice.load_state_dict(again.state_dict())
    assert twice.state_dict()["curriculum_batch"] == 4


@pytest.mark.parametrize(
    "change",
    [
        {"language_alpha": 0.5},
        {"caps": {"big": 5}},
        {"language_caps": {"en": 5}},
        {"language_weights": {"big/en": 0.5}},
        {"curriculum": CURRICULUM},
        {"curriculum": CURRICULUM[:1]},
    ],
)
def test_another_mix_is_refused_at_resume(processor, sets, change):
    base = {} if change != {"curriculum": CURRICULUM[:1]} else {"curriculum": CURRICULUM}
    state = make_loader(processor, sets, **base).state_dict()
    other = make_loader(processor, sets, **change)
    with pytest.raises(DataError, match=rf"order of samples cannot go on: data\.{next(iter(change))} was"):
        other.load_state_dict(state)
    other.load_state_dict(make_loader(processor, sets, **change).state_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"language_alpha": -0.1}, r"data\.language_alpha must be a finite number >= 0 or unset, got -0\.1"),
        ({"caps": {"big": -1}}, r"data\.caps\.big must be >= 0, got -1"),
        ({"caps": {"big": 1}, "text_ratio": 1.0}, r"data\.caps and data\.language_caps limit no set"),
        ({"curriculum": (MixStage(from_step=0),)}, r"curriculum\[0\]\.from_step must be > 0; until then the mix is th"),
        ({"curriculum": CURRICULUM[::-1]}, r"curriculum\[1\]\.from_step must be > 8, where the stage before begins"),
        (
            {"curriculum": (MixStage(from_step=1, weights=(1.0, 1.0, 1.0)),)},
            r"data\.curriculum\[0\]\.weights must hold one value for each of the 2 data\.paths, got 3",
        ),
        (
            {"curriculum": (MixStage(from_step=1, language_weights={"en": -1.0}),)},
            r"data\.curriculum\[0\]\.language_weights\.en must be a finite number >= 0, got -1",
        ),
    ],
)
def test_settings_out_of_range(sets, values, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(paths=sets, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"caps": {"bog": 1}}, r"data\.caps names 'bog'; the data sets are \['big', 'small'\]"),
        ({"language_caps": {"fr": 1}}, r"data\.language_caps names 'fr'; the data have the languages \['en', 'pt', 'z"),
        ({"language_weights": {"small/en": 1.0}}, r"data\.language_weights names 'small/en'"),
        ({"caps": {"big": 0, "small": 0}}, r"caps leave no sample in an epoch$"),
        ({"curriculum": (MixStage(from_step=1, weights=(0.0,)),)}, r"leave no sample in an epoch from step 1 on"),
    ],
)
def test_names_that_are_none_and_mixes_without_samples(processor, sets, values, message):
    with pytest.raises(ConfigError, match=message):
        make_loader(processor, sets, **values)


def test_a_curriculum_comes_from_yaml_and_is_saved(tmp_path, sets):
    path = tmp_path / "mix.yaml"
    stages = [{"from_step": 3, "weights": [0.0, 2.0]}, {"from_step": 8, "language_alpha": 0.0}]
    path.write_text(yaml.safe_dump({"curriculum": stages, "caps": {"big": 9}}), encoding="utf-8")
    config = parse_config(DataConfig, ["--config", str(path), "--paths", *sets, "--language-alpha", "0.5"])
    assert config.curriculum == (CURRICULUM[0], MixStage(from_step=8, language_alpha=0.0))
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    assert load_config(DataConfig, tmp_path / "saved.yaml") == config
