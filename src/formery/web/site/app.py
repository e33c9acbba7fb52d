"""The server's routes: pages, the list's answers, the feed, and the viewer's stream."""

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from threading import Lock
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from formery.catalog import Entry, Wanted, meaning, papers, search
from formery.catalog.news import day, news
from formery.errors import FormeryError
from formery.web.feed import atom
from formery.web.site import measured, viewer
from formery.web.site.pages import STATIC, Asked, Pages, static
from formery.web.site.viewer import Busy, Run, Viewer

FRESH = 5.0  # seconds for which what was read of the disk is taken for what is there
LONGEST = 300  # characters of a query
BODY = 64 * 1024  # bytes of a request
KINDS = {".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Shelf:
    """The papers, read anew when what was read is some seconds old."""

    def __init__(self) -> None:
        self.lock, self.read, self.entries = Lock(), -FRESH, list[Entry]()

    def __call__(self) -> list[Entry]:
        with self.lock:
            if time.monotonic() - self.read > FRESH:
                self.entries, self.read = papers(), time.monotonic()
            return self.entries


class Site:
    """What answers requests."""

    def __init__(self, runs: int = 2) -> None:
        self.shelf, self.viewer = Shelf(), Viewer(runs)
        self.pages = Pages(served=True, by_meaning=meaning.installed())

    def home(self, request: Request) -> Response:
        given = request.query_params
        asked = Asked(
            query=given.get("q", "").strip()[:LONGEST],
            part=given.get("part", ""),
            domain=given.get("domain", ""),
            status=given.get("status", ""),
            lossless=given.get("lossless") == "yes",
            training=given.get("training", ""),
            meaning=given.get("meaning") == "yes" and self.pages.by_meaning,
        )
        wanted = Wanted(
            asked.part or None,
            asked.domain or None,
            asked.status or None,
            lossless=True if asked.lossless else None,
            trained={"yes": True, "no": False}.get(asked.training),
        )
        entries = self.shelf()
        found = search(asked.query, wanted, asked.meaning, entries) if asked.anything else entries
        return HTMLResponse(self.pages.home(entries, found, asked))

    def paper(self, request: Request) -> Response:
        entries = self.shelf()
        found = next((one for one in entries if one.card.slug == request.path_params["slug"]), None)
        if found is None:
            raise HTTPException(404, f"There is no paper named {request.path_params['slug']} here.")
        return HTMLResponse(self.pages.paper(found, entries))

    def work(self, request: Request) -> Response:
        entries, name = self.shelf(), request.path_params["name"]
        points = measured.works(entries).get(name)
        if points is None:
            raise HTTPException(404, f"Nothing was measured on a work named {name}.")
        return HTMLResponse(self.pages.work(name, points, entries))

    def watch(self, request: Request) -> Response:
        choices = viewer.choices()
        given = {
            "models": viewer.models(), "choices": choices, "prompts": viewer.PROMPTS, "tokens": viewer.TOKENS,
            "characters": viewer.CHARACTERS, "method": request.query_params.get("method", "aggressive-decoding"),
        }  # fmt: skip
        return HTMLResponse(self.pages.watch(self.shelf(), given))

    async def run(self, request: Request) -> Response:
        # A page of another site could have a reader's browser ask; such a request says where it comes from.
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise HTTPException(403, "Runs are started from the viewer's own page.")
        try:
            run = _run(await _body(request))
        except FormeryError as error:
            return JSONResponse({"error": str(error)}, 400)
        try:
            self.viewer.admit()
        except Busy:
            sentence = "All places are taken just now; try again in a few seconds."
            return JSONResponse({"error": sentence}, 503, {"Retry-After": "5"})
        return StreamingResponse(_lines(self.viewer.events(run)), media_type="application/x-ndjson")

    def feed(self, request: Request) -> Response:
        since = day(request.query_params.get("since"))
        text = atom(news(since, self.shelf()), since, str(request.base_url))
        return Response(text, media_type="application/atom+xml")

    def static(self, request: Request) -> Response:
        name = request.url.path.rpartition("/")[2]
        return Response(static(name), media_type=KINDS[name[name.rindex(".") :]])

    def problem(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            status, sentence = error.status_code, str(error.detail)
        elif isinstance(error, FormeryError):
            status, sentence = 400, str(error)
        else:
            status, sentence = 500, "Something went wrong here; the server's window says what."
        if status == 404 and sentence == "Not Found":
            sentence = "There is no such page here."
        return HTMLResponse(self.pages.problem(status, sentence, self.shelf()), status)

    def app(self, hosts: Sequence[str]) -> Starlette:
        """The application; hosts: the names under which it may be asked."""
        routes = [
            Route("/", self.home),
            Route("/index.html", self.home),
            Route("/papers/{slug}.html", self.paper),
            Route("/works/{name}.html", self.work),
            Route("/watch.html", self.watch),
            Route("/watch/run", self.run, methods=["POST"]),
            Route("/feed.xml", self.feed),
            *(Route(f"/{name}", self.static) for name in STATIC),
        ]
        guarded = [Middleware(TrustedHostMiddleware, allowed_hosts=[*hosts], www_redirect=False), Middleware(Headers)]
        handlers: Any = {HTTPException: self.problem, FormeryError: self.problem, Exception: self.problem}
        return Starlette(routes=routes, middleware=guarded, exception_handlers=handlers)


class Headers:
    """Adds to every answer what keeps a page to itself: nothing from elsewhere, nothing within another page."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        await self.app(scope, receive, sending if scope["type"] == "http" else send)


async def _body(request: Request) -> Any:
    """The request's JSON, unless there is too much of it."""
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > BODY:
            raise FormeryError(f"a request of more than {BODY // 1024} KiB is too long.")
    try:
        return json.loads(data)
    except ValueError as error:
        raise FormeryError("the request is no JSON.") from error


def _run(given: Any) -> Run:
    kinds: dict[str, Any] = {"model": str, "method": str, "prompt": str, "tokens": int, "seed": int}
    needed = {"model", "method", "prompt"}
    if not isinstance(given, dict) or not needed <= given.keys() <= {*kinds, "temperature"}:
        raise FormeryError(f"a run has the fields {', '.join(kinds)} and temperature.")
    for name, kind in kinds.items():
        if name in given and (not isinstance(given[name], kind) or isinstance(given[name], bool)):
            raise FormeryError(f"{name} should be of kind {kind.__name__}.")
    if not isinstance(given.get("temperature"), int | float | None) or isinstance(given.get("temperature"), bool):
        raise FormeryError("temperature should be a number.")
    return Run(**given)


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for event in events:
        yield json.dumps(event).encode() + b"\n"
