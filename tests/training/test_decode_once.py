"""A run on any layout decodes each picture of a step once, over all ranks, and trains like one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.data import images
from parrot_sys.data.feature_store import FeatureStore
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.parallel.agreement import gather_everywhere
from parrot_sys.training.trainer import Trainer
from tests.training.layouts import layout
from tests.training.tiny import losses, run, tiny_config

LAYOUTS = {
    "tp2-pp2": (layout(tensor=2, pipeline=2), 4),
    "cp2": (layout(context=2), 2),
    "ep2-dp2": (layout(experts=2), 2),
}
STEPS = 2


def counting(method: str, owner: Any, counts: Path) -> Callable[[Trainer], None]:
    """Counts the calls while a trainer runs; rank 0 writes the sum over all ranks."""

    def hook(trainer: Trainer) -> None:
        number, original, train = [0], getattr(owner, method), trainer._train

        def counted(*arguments: Any, **options: Any) -> Any:
            number[0] += 1
            return original(*arguments, **options)

        def counted_train(*arguments: Any) -> Any:
            setattr(owner, method, counted)  # (after the features were computed)
            try:
                return train(*arguments)
            finally:
                setattr(owner, method, original)
                everyone = gather_everywhere(number[0])
                counts.write_text(" ".join(map(str, everyone)))

        trainer._train = counted_train  # type: ignore[method-assign]

    return hook


@pytest.mark.parametrize("cached", [False, True], ids=["pixels", "features"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pictures_of_a_step_are_read_once(tmp_path: Path, name: str, cached: bool) -> None:
    parallel, ranks = LAYOUTS[name]
    owner, method = (FeatureStore, "_read") if cached else (images, "load_image")
    counts: dict[str, list[int]] = {}
    configs = {}
    for kind, own, size in (("one", ParallelConfig(), 1), (name, parallel, ranks)):
        (tmp_path / kind).mkdir()
        configs[kind] = tiny_config(tmp_path / kind, parallel=own, max_steps=STEPS, cache_image_features=cached)
        run(configs[kind], size, counting(method, owner, tmp_path / kind / "counts"))
        counts[kind] = list(map(int, (tmp_path / kind / "counts").read_text().split()))
    pictures = sum(counts["one"])
    assert pictures > STEPS
    # (One step may have been prepared ahead on either side.)
    assert sum(counts[name]) == pictures
    assert max(counts[name]) < pictures
    for one, other in zip(losses(configs["one"]), losses(configs[name]), strict=True):
        assert one[0] == other[0]
        assert other[1] == pytest.approx(one[1], rel=1e-5)
        assert other[2] == pytest.approx(one[2], rel=1e-4)
