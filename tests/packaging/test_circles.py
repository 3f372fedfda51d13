"""No module imports another in a circle, not even for its types alone."""

from __future__ import annotations

import graphlib

import grimp


def test_imports_have_an_order() -> None:
    graph = grimp.build_graph("parrot_sys", "parrot_kernels", exclude_type_checking_imports=False)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 200
    list(graphlib.TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle
