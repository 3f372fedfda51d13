"""The short form of `benchmarks.bench_serving`: many clients at once, of which some leave and some are hostile."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx2
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import content_type_conformance, not_a_server_error, status_code_conformance

from benchmarks.serving_load import Load, LoadResult, ask, questions
from tests.support.serving import Server, picture, serving


async def _load(server: Server, seconds: float) -> LoadResult:
    bodies = questions(["What is this?", "Is it <image> old?"], [picture(k) for k in range(3)], 6)
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        wanted = [await ask(client, body) for body in bodies]
        load = Load(client, bodies, wanted, leaving=0.3, hostile=0.05)
        return await load.run(streams=64, seconds=seconds)


def test_many_clients_and_documents_of_all_kinds(tmp_path: Path) -> None:
    options = ["--engine.num-blocks", "120", "--engine.scheduler.max-running", "40", "--engine.block-size", "4"]
    with serving(tmp_path, *options) as server:
        result = asyncio.run(_load(server, 2.5))
        assert result.wrong == []
        assert result.server_errors == 0
        assert min(result.answers, result.left, result.hostile) > 0
        found = server.wait_idle()
        assert found["parrot:num_requests_paused"] == 0
        _ask_what_the_document_allows(server)
        server.wait_idle()
        assert not [line for line in server.logged("request") if line["status"] >= 500]
        assert "Traceback" not in server.log.read_text()


def _ask_what_the_document_allows(server: Server) -> None:
    """Requests drawn from the OpenAPI document, right and wrong ones, get no 5xx and only documented answers."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = [not_a_server_error, status_code_conformance, content_type_conformance]
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 7
    for operation in operations:
        modes = list(schemathesis.GenerationMode)
        for mode in modes if operation.method.lower() == "post" else modes[:1]:

            @settings(max_examples=10, database=None, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def asked(case: schemathesis.Case) -> None:
                case.call_and_validate(base_url=server.url, checks=checks)

            asked()
