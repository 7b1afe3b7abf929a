"""The HTTP interface of a trained run, as an ASGI application."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any

import prometheus_client
import torch
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client.multiprocess import mark_process_dead
from starlette.exceptions import HTTPException

from vimamba.data.loaders import Item
from vimamba.errors import UserError, require
from vimamba.inference.answers import Asked
from vimamba.inference.predictor import Predictor
from vimamba.processes import cores
from vimamba.serve.batching import Batcher, Failed
from vimamba.serve.heat import has_heat, heat_map, heat_of
from vimamba.serve.masks import with_masks
from vimamba.serve.options import Refused, ServeOptions
from vimamba.serve.page import headers, page
from vimamba.serve.schemas import ANSWERS, BODY
from vimamba.serve.uploads import IN_WORK, Memory, Share, Upload, picture, read_body, size_of, uploads
from vimamba.serve.watch import LOG, SHARED, Numbers, Watched
from vimamba.tasks.results import Classification
from vimamba_command import package_version

PATHS = {"/", "/predict", "/health", "/metrics", "/openapi.json"}
LANES = 2  # on a CPU, where the threads of one batch wait for each other whenever one of them serves requests instead


@dataclasses.dataclass
class Wanted:
    """An image of a request, and what the model takes of it, or why it takes nothing, once somebody has looked."""

    upload: Upload
    share: Share
    item: Item | UserError | None = None


class Service:
    """A predictor, and what stands between it and requests.

    Args:
        predictor: of the run.
        options: of the server.
    """

    def __init__(self, predictor: Predictor, options: ServeOptions):
        self.predictor, self.options = predictor, options
        self.numbers, self.memory = Numbers(), Memory(options.max_memory)
        self.has_heat = has_heat(predictor)
        self.scores_alone = issubclass(predictor.task.result, Classification)  # of which an answer takes no time
        self.max_pixels = options.max_pixels(predictor.task.name, len(predictor.class_names))
        self.threads = ThreadPoolExecutor(max(1, cores()), "images")
        self.cores = torch.get_num_threads()
        lanes = LANES if predictor.device.type == "cpu" and self.cores > 1 else 1
        # Where each core has a lane, a thread more would only take their turns.
        self.decodes_ahead = predictor.device.type != "cpu" or self.cores > lanes
        self.batcher = Batcher(
            self._results, options.max_batch, options.max_wait_ms / 1000, options.max_queue, self.numbers.batch, lanes
        )

    def _results(self, images: list[Wanted], busy: int) -> list[Any]:
        torch.set_num_threads(max(1, self.cores // busy))  # of this thread
        return list(self.predictor.results([self._item(wanted) for wanted in images]))

    async def predict(self, request: Request, asked: Asked, masks: bool, heat: bool) -> JSONResponse:
        """Answer a request.

        Raises:
            UserError: it gets no answer.
        """
        facts = request.scope["facts"]
        require(
            self.has_heat or not heat, f"heat_map: {self.predictor.card.model} is no classifier that reads by scans"
        )
        try:
            with self.memory.share() as share:
                body = await read_body(request, self.options, share)
                found, several = await uploads(request, body)
                facts |= {"bytes": len(body), "images": len(found)}
                self.batcher.check_room(len(found))
                answering = self._answers(found, asked, masks, heat, share)
                answers = await asyncio.wait_for(answering, self.options.timeout_s)
        except asyncio.TimeoutError:
            raise Refused(504, f"there was no answer within {self.options.timeout_s:g} s; try again later") from None
        finally:
            self.numbers.memory.set(self.memory.held)
            self.numbers.waiting.set(len(self.batcher.queue))
        for answer in answers:
            full = getattr(answer, "status", None) == 429  # of the whole request
            if full or isinstance(answer, Failed) or (isinstance(answer, UserError) and not several):
                raise answer
        lines = [self._line(upload, answer) for upload, answer in zip(found, answers, strict=True)]
        return JSONResponse({"results": lines} if several else lines[0])

    async def _answers(self, found: list[Upload], asked: Asked, masks: bool, heat: bool, share: Share) -> list[Any]:
        images = [Wanted(upload, share) for upload in found]
        if self.decodes_ahead:
            for wanted in images:
                await self._threaded(self._item, wanted)
        queued = [wanted for wanted in images if not isinstance(wanted.item, UserError)]
        given = dict(zip(map(id, queued), await self.batcher.answers(queued), strict=True))
        answers = [given.get(id(wanted), wanted.item) for wanted in images]
        if not self.scores_alone:
            return [await self._threaded(self._body, answer, asked, masks) for answer in answers]
        bodies = [self._body(answer, asked, masks) for answer in answers]
        if not heat:
            return bodies
        return [await self._with_heat(body, wanted.item) for body, wanted in zip(bodies, images, strict=True)]

    async def _with_heat(self, body: Any, item: Any) -> Any:
        if isinstance(body, Exception):
            return body
        heat_hw = await self.batcher.alone(heat_of, self.predictor, item.image)
        return body | {"heat_map": await self._threaded(heat_map, self.predictor, item.image, heat_hw)}

    def _item(self, wanted: Wanted) -> Item | UserError:
        """What the model takes of an image, or why it takes nothing, found once."""
        if wanted.item is None:
            try:
                wanted.share.add(IN_WORK * size_of(wanted.upload, self.max_pixels))
                wanted.item = self.predictor.item(picture(wanted.upload))
            except UserError as error:
                wanted.item = error
        return wanted.item

    def _body(self, answer: Any, asked: Asked, masks: bool) -> Any:
        if isinstance(answer, Exception):
            return answer
        answer = asked.of(answer)
        return asked.body(answer) | (with_masks(answer, asked.top) if masks else {})

    def _line(self, upload: Upload, answer: Any) -> dict[str, Any]:
        return {"image": upload.name, **({"error": str(answer)} if isinstance(answer, UserError) else answer)}

    async def _threaded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, functools.partial(call, *arguments))

    def health(self) -> dict[str, Any]:
        """What is served."""
        card = self.predictor.card
        return {
            "status": "ok", "model": card.model, "task": card.task, "classes": len(card.class_names),
            "device": str(self.predictor.device), "version": package_version(),
        }  # fmt: skip


def create_app(predictor: Predictor, options: ServeOptions) -> Watched:
    """The application around a predictor."""
    service = Service(predictor, options)
    app = FastAPI(
        title="vimamba", version=package_version(), lifespan=functools.partial(_running, service),
        docs_url=None, redoc_url=None,  # pages that load scripts from elsewhere; GET /openapi.json is there
        description=f"What {predictor.card.model} says of images. Errors are one JSON object with one sentence.",
        redirect_slashes=False,
    )  # fmt: skip
    _add_errors(app)
    card = predictor.card
    text = page(card.model, card.task, card.class_names, heat=service.has_heat)

    @app.get("/", response_class=HTMLResponse, summary="A page to try the model on")
    async def root() -> Response:
        return HTMLResponse(text, headers=headers(text))

    @app.get("/health", summary="Whether it serves, and what")
    async def health() -> dict[str, Any]:
        return service.health()

    @app.get("/metrics", summary="Numbers for Prometheus")
    async def metrics() -> Response:
        return Response(service.numbers.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.post("/predict", summary="What images show", openapi_extra={"requestBody": BODY}, responses=ANSWERS)
    async def predict(
        request: Request,
        top: Annotated[int | None, Query(ge=1, description="classes, or objects, for each image")] = None,
        min_score: Annotated[float, Query(ge=0, le=1, description="objects below it are left out")] = 0.5,
        masks: Annotated[bool, Query(description="add masks, as PNG in base64")] = False,
        heat_map: Annotated[bool, Query(description="add what a classifier reads, as PNG in base64")] = False,
    ) -> JSONResponse:
        return await service.predict(request, Asked.by(predictor, top, min_score), masks, heat_map)

    # Twice for the request and its answer, once for a client that reads slowly.
    return Watched(app, service.numbers, PATHS, 3 * options.timeout_s)


@asynccontextmanager
async def _running(service: Service, app: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(service.batcher.run())
    LOG.info("serving", extra={"facts": service.health()})
    yield
    task.cancel()
    service.threads.shutdown(wait=False, cancel_futures=True)
    if SHARED in os.environ:
        mark_process_dead(os.getpid())
    LOG.info("stopped")


def _add_errors(app: FastAPI) -> None:
    """Every error is a status code and one sentence in JSON."""

    def said(status: int, sentence: str, **more: str) -> JSONResponse:
        extra = {"retry-after": "1"} if status in (429, 503) else {}
        return JSONResponse({"error": sentence}, status, headers={**extra, **more})

    async def wrong(request: Request, error: Any) -> JSONResponse:
        return said(getattr(error, "status", 422), " ".join(str(error).split()))

    async def unknown(request: Request, error: Any) -> JSONResponse:
        way = {404: f"there is nothing here; the paths are {', '.join(sorted(PATHS))}"}
        allowed = (error.headers or {}).get("Allow", "")
        way[405] = f"this path takes {allowed or 'another method'}, not {request.method[:20]}"
        return said(error.status_code, way.get(error.status_code, str(error.detail)), **(error.headers or {}))

    async def invalid(request: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        return said(422, f"{first['loc'][-1]}: {first['msg'].lower()}")

    async def failed(request: Request, error: Any) -> JSONResponse:
        return said(500, "something went wrong here; the server's log says what")

    handlers: dict[Any, Callable[[Request, Any], Coroutine[Any, Any, JSONResponse]]] = {
        UserError: wrong, HTTPException: unknown, RequestValidationError: invalid, Exception: failed,
    }  # fmt: skip
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
