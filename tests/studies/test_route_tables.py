"""The table of what routes tell, over several seeds."""

from __future__ import annotations

from studies.route_tables import routes_table


def test_table_of_routes() -> None:
    def run(bits: float, dead: list[int]) -> dict:
        told = {"bits": bits, "by_chance": 0.01, "most": 2.585}
        routes = {
            "language": told,
            "category": {**told, "most": 3.9},
            "entropy": 2.5,
            "picture_entropy": 0.1,
            "dead": dead,
        }
        return {"routes": {"style": routes}}

    results = {
        "plain": {"0": {"routes": {}}},
        "a": {"0": run(2.0, []), "1": run(1.0, [3, 4])},
        "b": {"0": run(0.0, [1])},
    }
    lines = routes_table(results, "style")
    assert len(lines) == 4
    assert lines[2].startswith("| a | 1.50 \u00b1 0.71 of 2.59 (by chance 0.010) | 1.50 \u00b1 0.71 of 3.90")
    assert lines[2].endswith("| 0, 2 |")
    assert lines[3].startswith("| b | 0.00 of 2.59")
    assert routes_table(results, "concept") == []
