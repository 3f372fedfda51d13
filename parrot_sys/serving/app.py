"""The routes of the server."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response

from parrot_sys import __version__
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import ParrotError
from parrot_sys.serving.answers import Answering, ChatAnswering, CompletionAnswering
from parrot_sys.serving.config import ServeConfig
from parrot_sys.serving.driver import EngineDriver
from parrot_sys.serving.errors import ApiError, as_api_error
from parrot_sys.serving.http import BodyReader, EventStream, HeldBytes, error_response, facts_of, until_disconnect
from parrot_sys.serving.metrics import Metrics
from parrot_sys.serving.parsing import parse
from parrot_sys.serving.prompts import Preparer, Prompt
from parrot_sys.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from parrot_sys.serving.routes import routing_field
from parrot_sys.serving.token_texts import TokenTexts

T = TypeVar("T")
PAGE = Path(__file__).parent / "page"
_BODIES = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_REF = "#/components/schemas/{model}"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": about}
    for status, about in {
        400: "A part of the request is wrong; `error.param` names it.",
        401: "No valid key.",
        404: "No such model.",
        408: "The body did not arrive in time.",
        413: "Larger than the limits.",
        415: "The body is no JSON.",
        429: "Too many requests wait; Retry-After says when to come again.",
        500: "The server failed.",
        503: "The engine has failed, or the server stops.",
        504: "The answer took too long.",
    }.items()
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """All that the routes need."""

    config: ServeConfig
    processor: ParrotProcessor
    preparer: Preparer
    driver: EngineDriver
    metrics: Metrics
    texts: TokenTexts
    card: dict[str, Any]
    """Facts about the model for its page."""
    workers: ThreadPoolExecutor
    bodies: BodyReader
    pixels: HeldBytes
    """Pixels of requests whose answers have not ended."""

    async def prepared(self, request: Request, prepare: Callable[[bytes], T]) -> T:
        """Result of `prepare` for the request's body, worked out by a worker thread."""
        loop = asyncio.get_running_loop()
        with self.bodies.held() as read:
            body = await read(request)
            return await loop.run_in_executor(self.workers, prepare, body)

    async def submitted(
        self,
        request: Request,
        prepare: Callable[[bytes], tuple[Any, list[Prompt]]],
        answering: Callable[..., Answering],
    ) -> Answering:
        """The answers to a request, from its body on."""
        times = functools.partial(self.metrics.answers, time.monotonic())
        asked, prompts = await self.prepared(request, prepare)
        rows = [prompt.rows for prompt in prompts for _ in prompt.requests]
        held = sum(prompt.pixel_bytes for prompt in prompts)
        self.pixels.take(held)
        try:
            streams = await self.driver.submit([own for prompt in prompts for own in prompt.requests], rows)
        except BaseException:
            self.pixels.give_back(held)
            raise
        made = answering(asked, prompts, streams, name=self.preparer.name, times=times, texts=self.texts)
        made.on_close(lambda: self.pixels.give_back(held))
        facts = facts_of(request.scope)
        facts["prompt_tokens"] = sum(prompt.rows for prompt in prompts)
        facts["images"] = sum(len(stream.images) for stream in streams[:1])
        if self.config.log_texts:
            facts["prompts"] = [self.processor.tokenizer.decode([i for i in own.ids if i >= 0]) for own in prompts]
        return made

    async def answer(
        self,
        request: Request,
        prepare: Callable[[bytes], tuple[Any, list[Prompt]]],
        answering: Callable[..., Answering],
    ) -> Response:
        """Answers a request, whole or as a stream; one whose sender leaves is not answered."""
        made = await self.submitted(request, prepare, answering)
        facts = facts_of(request.scope)
        if made.request.stream:
            return EventStream(self._noted(made, facts), made.close)
        try:
            answer = await until_disconnect(request.receive, made.whole())
        finally:
            made.close()
            _note(made, facts)
        if self.config.log_texts:
            facts["answers"] = answer["choices"]
        return JSONResponse(answer)

    async def _noted(self, made: Answering, facts: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        chunks = made.chunks()
        try:
            async for chunk in chunks:
                if "error" in chunk:
                    facts["error"] = chunk["error"]["code"]
                yield chunk
        finally:
            await chunks.aclose()
            _note(made, facts)


def _note(made: Answering, facts: dict[str, Any]) -> None:
    facts["completion_tokens"] = made.completion_tokens
    facts["finish_reasons"] = made.finish_reasons


def create_app(service: Service) -> FastAPI:
    """The routes."""
    app = FastAPI(title="parrot serve", version=__version__, docs_url=None, redoc_url=None)
    _add_answers(app, service)
    _add_facts(app, service)
    _add_errors(app)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    app.openapi = functools.partial(_openapi, app)  # type: ignore[method-assign]
    return app


def _post(
    app: FastAPI, path: str, body: type, *, streams: bool = False
) -> Callable[[Callable[..., Awaitable[Response]]], object]:
    """A route that reads its body itself."""
    events: dict[str, Any] = {"content": {EventStream.media_type: {}}}
    answers: dict[int | str, dict[str, Any]] = {200: events} if streams else {}
    content = {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}
    return app.post(
        path,
        responses=_ERRORS | answers,
        response_class=JSONResponse,
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )


def _add_answers(app: FastAPI, service: Service) -> None:
    @_post(app, "/v1/chat/completions", ChatRequest, streams=True)
    async def chat(request: Request) -> Response:
        """Answers a conversation with pictures."""

        def answering(asked: ChatRequest, prompts: list[Prompt], streams: Any, **rest: Any) -> Answering:
            extras = (lambda: routing_field(streams[0], service.texts)) if asked.parrot_routing else dict
            return ChatAnswering(asked, prompts, streams, extras=extras, **rest)

        return await service.answer(request, service.preparer.chat, answering)

    @_post(app, "/v1/completions", CompletionRequest, streams=True)
    async def completions(request: Request) -> Response:
        """Continues a text."""
        return await service.answer(request, service.preparer.completion, CompletionAnswering)

    @_post(app, "/tokenize", TokenizeRequest)
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or a conversation."""
        ids = await service.prepared(request, service.preparer.tokenize)
        return JSONResponse({"count": len(ids), "max_model_len": service.preparer.max_rows, "tokens": ids})

    @_post(app, "/detokenize", DetokenizeRequest)
    async def detokenize(request: Request) -> Response:
        """Text of token ids."""

        def text(body: bytes) -> str:
            ids = parse(DetokenizeRequest, body).tokens
            service.preparer.check_ids(ids, "tokens")
            return service.processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

        return JSONResponse({"prompt": await service.prepared(request, text)})


def _add_facts(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models() -> dict[str, Any]:
        """The model that is served."""
        own = {"id": service.preparer.name, "object": "model", "created": created, "owned_by": "parrot_sys"}
        own |= {"max_model_len": service.preparer.max_rows, "parrot": service.card}
        return {"object": "list", "data": [own]}

    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> Response:
        """Whether requests are answered."""
        dead = service.driver.is_dead
        return JSONResponse({"status": "dead" if dead else "ok"}, status_code=503 if dead else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    async def known(request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for these"
        status = error.status_code
        return error_response(
            ApiError(status, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers)
        )

    async def left(request: Request, error: Exception) -> Response:
        facts_of(request.scope)["disconnected"] = True
        return Response(status_code=499)

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(ParrotError, known)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, known)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document, with the bodies that routes read themselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, schemas = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REF)
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        app.openapi_schema = document
    return app.openapi_schema
