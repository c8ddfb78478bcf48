"""Serve a folder of bundles over HTTP: FastAPI around the runtime.

    make export
    python examples/serve.py bundles --port 8000                           then http://127.0.0.1:8000/docs
    curl localhost:8000/bundles
    curl localhost:8000/bundles/minilm/embed -H 'content-type: application/json' -d '{"texts": ["A man is eating."]}'
    curl localhost:8000/bundles/vit/classify -F image=@digit.png
    curl localhost:8000/bundles/clip/zero-shot -F image=@digit.png -F labels=one -F labels=two -F 'templates=a {}'
    curl localhost:8000/bundles/transformer/translate -H 'content-type: application/json' -d '{"texts": ["3 May 1979"]}'
    curl -N localhost:8000/bundles/gpt/stream -H 'content-type: application/json' -d '{"prompt": "It is a truth"}'

Each bundle is loaded once and shared by all threads; a call uses one thread, and FastAPI runs calls side by side. What
a caller got wrong is answered with status 422 and the runtime's message; what is wrong on this side with 500 and no
detail, which is in the log. A bundle that cannot be loaded does not keep the others from being served. Needs the
runtime, fastapi, uvicorn and python-multipart: `pip install '.[examples]'`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.concurrency import iterate_in_threadpool, run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from transom.runtime import load
from transom.runtime.errors import InputError, TransomError
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.bert import Bert
from transom.runtime.tasks.clip import Clip
from transom.runtime.tasks.gpt import GPT
from transom.runtime.tasks.postprocess import Ranked
from transom.runtime.tasks.transformer import Transformer
from transom.runtime.tasks.vit import ViT

MAX_BODY_BYTES = 16 << 20
MAX_TEXTS = 64
MAX_CHARACTERS = 20_000  # of a text
MAX_NEW_TOKENS = 1024
SHUTDOWN_S = 5  # for streams to end by themselves

log = logging.getLogger("uvicorn.error")
router = APIRouter()

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
NewTokens = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]
FormTexts = Annotated[list[Text], Form(max_length=MAX_TEXTS)]
TopK = Annotated[int, Form(ge=1)]
Kind = TypeVar("Kind", bound=LoadedBundle)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a keyword that is misspelt is refused, not ignored


class EmbedBody(Body):
    texts: Texts


class TranslateBody(Body):
    texts: Texts
    max_new_tokens: NewTokens | None = None
    num_beams: Annotated[int, Field(ge=1, le=8)] | None = None


class GenerateBody(Body):
    """The runtime's keywords; what is left out is as the model says."""

    prompt: Text
    max_new_tokens: NewTokens = 64
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def keywords(self) -> dict[str, Any]:
        return self.model_dump(exclude={"prompt"}, exclude_none=True)


class BundleInfo(BaseModel):
    name: str
    family: str
    task: str
    precision: str


class Health(BaseModel):
    status: str
    bundles: list[str]
    broken: list[str]


class Vectors(BaseModel):
    vectors: list[list[float]]


class Label(BaseModel):
    label: str
    probability: float


class Labels(BaseModel):
    labels: list[Label]


class GeneratedText(BaseModel):
    text: str


class GeneratedTexts(BaseModel):
    texts: list[str]


def bundle_named(name: str, request: Request) -> LoadedBundle:
    """The bundle that a path names."""
    state = request.app.state
    if name in state.broken:
        raise state.broken[name]
    if name not in state.bundles:
        raise HTTPException(404, f"there is no bundle {name!r}; see /bundles.")
    found: LoadedBundle = state.bundles[name]
    return found


Named = Annotated[LoadedBundle, Depends(bundle_named)]


def of_kind(bundle: LoadedBundle, kind: type[Kind]) -> Kind:
    if not isinstance(bundle, kind):
        raise InputError(f"this bundle is for {bundle.manifest.task}; the call needs one of family {kind.__name__}.")
    return bundle


def labels_of(ranked: Ranked) -> Labels:
    return Labels(labels=[Label(label=label, probability=probability) for label, probability in ranked])


@router.get("/health")
def health(request: Request) -> Health:
    state = request.app.state
    return Health(status="degraded" if state.broken else "ok", bundles=[*state.bundles], broken=[*state.broken])


@router.get("/bundles")
def bundles(request: Request) -> list[BundleInfo]:
    found = {name: bundle.manifest for name, bundle in request.app.state.bundles.items()}
    return [BundleInfo(name=name, family=m.family, task=m.task, precision=m.precision) for name, m in found.items()]


# These are plain functions, not coroutines: FastAPI calls each in a thread of its own, so that none holds up another.


@router.post("/bundles/{name}/embed")
def embed(bundle: Named, body: EmbedBody) -> Vectors:
    found = bundle.embed_text(body.texts) if isinstance(bundle, Clip) else of_kind(bundle, Bert).embed(body.texts)
    return Vectors(vectors=found.tolist())


@router.post("/bundles/{name}/classify")
def classify(bundle: Named, image: UploadFile, top_k: TopK = 5) -> Labels:
    return labels_of(of_kind(bundle, ViT).classify(image.file.read(), top_k=top_k))


@router.post("/bundles/{name}/zero-shot")
def zero_shot(bundle: Named, image: UploadFile, labels: FormTexts, templates: FormTexts | None = None) -> Labels:
    return labels_of(of_kind(bundle, Clip).zero_shot(image.file.read(), labels, templates=templates))


@router.post("/bundles/{name}/translate")
def translate(bundle: Named, body: TranslateBody) -> GeneratedTexts:
    keywords = body.model_dump(exclude={"texts"}, exclude_none=True)
    return GeneratedTexts(texts=of_kind(bundle, Transformer).translate(body.texts, **keywords))


@router.post("/bundles/{name}/generate")
def generate(bundle: Named, body: GenerateBody) -> GeneratedText:
    return GeneratedText(text=of_kind(bundle, GPT).generate(body.prompt, **body.keywords()))


@router.post("/bundles/{name}/stream", response_class=StreamingResponse)
def stream(bundle: Named, body: GenerateBody) -> StreamingResponse:
    """The text of ``generate`` as server-sent events: data: {"text": ...}, and at the end event: done (or: error)."""
    pieces = of_kind(bundle, GPT).stream(body.prompt, **body.keywords())  # checks everything before the first token
    return StreamingResponse(events(pieces), media_type="text/event-stream", headers={"cache-control": "no-store"})


async def events(pieces: Iterator[str]) -> AsyncIterator[str]:
    """Pieces as events, each made in a thread; when the client goes away, no more are made."""
    try:
        async for piece in iterate_in_threadpool(pieces):
            yield event({"text": piece})
        yield event({}, kind="done")
    except InputError as error:
        yield event({"detail": str(error)}, kind="error")
    except TransomError as error:
        log.error("%s: %s", type(error).__name__, error)
        yield event({"detail": "the generation failed; the server's log says why."}, kind="error")
    finally:
        if isinstance(pieces, Generator):
            pieces.close()  # frees its cache


def event(data: dict[str, str], kind: str = "message") -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def not_usable(request: Request, error: Exception) -> JSONResponse:
    """The caller's mistake: the message says what to do, and names nothing but what was sent."""
    return JSONResponse({"detail": str(error)}, 422)


async def malformed(request: Request, error: Exception) -> JSONResponse:
    """What does not have the right shape: where and why, without what was sent, which may be no Unicode."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    return JSONResponse({"detail": [{"loc": each["loc"], "msg": each["msg"]} for each in found]}, 422)


async def failed(request: Request, error: Exception) -> JSONResponse:
    """Ours: messages about bundles and devices name files of this machine, and stay here."""
    log.error("%s: %s: %s", request.url.path, type(error).__name__, error)
    return JSONResponse({"detail": "the server cannot answer this; its log says why."}, 500)


def bundle_folders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/bundle.json"))


def create_app(folder: Path) -> FastAPI:
    """The application over every bundle in ``folder``; they are loaded when it starts and freed when it stops."""

    def load_all(app: FastAPI, stack: ExitStack) -> None:
        for path in bundle_folders(folder):
            try:
                app.state.bundles[path.name] = stack.enter_context(load(path, threads=1))
            except TransomError as error:
                log.error("%s is not served: %s", path.name, error)
                app.state.broken[path.name] = error

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.bundles, app.state.broken = {}, {}
        with ExitStack() as stack:
            await run_in_threadpool(load_all, app, stack)
            yield

    app = FastAPI(title="Transom", lifespan=lifespan, max_body_size=MAX_BODY_BYTES)
    app.include_router(router)
    app.add_exception_handler(InputError, not_usable)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(TransomError, failed)
    return app


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of bundles")
    parser.add_argument("--host", default="127.0.0.1", help="there is no authentication: think before you open it")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if not bundle_folders(options.folder):
        print(f"serve: {options.folder} holds no bundles; export one into it.", file=sys.stderr)
        return 1
    app = create_app(options.folder)
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=SHUTDOWN_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
