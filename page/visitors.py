"""The visitors of the page: what they may ask its server for, and whether they are still there.

Gradio serves many routes that this page has no use for: they take files, fetch addresses, or run a
function past the queue. A Gate before them lets through what the page needs and refuses the rest,
before a byte of it is read.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
import json
from pathlib import Path
import re
import reprlib
import time
from typing import Any, NamedTuple
from urllib.parse import parse_qs

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

API = "/gradio_api"
ENDPOINT = "respond"  # the function that visitors run; the second network's is respond_2
JOIN, CALL, CANCEL = f"{API}/queue/join", f"{API}/call", f"{API}/cancel"
LISTEN = f"{API}/queue/data"
READABLE = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(static|assets|svelte)/.+"
    rf"|{API}/(info/?|app_id/?|startup-events|theme\.css|heartbeat/[^/]+|queue/data)"
)
FILE = f"{API}/file="
LARGEST_BODY = 2**21  # bytes of a request: room for any choice that a visitor can make
PATIENCE = 5.0  # seconds; then nobody is waiting who has not begun to listen
POLL_SECONDS = 0.1
MOST_KEPT = 2**30  # bytes of pictures, the newest, that visitors can still download
MOST_EACH = 4  # jobs of one visitor that wait or run
REFUSAL = "this page draws images and does nothing else: it takes no files and fetches none"


def endpoint(place: int) -> str:
    """The name of the function that draws with the page's network number `place`, from 0."""
    return f"{ENDPOINT}_{place + 1}" if place else ENDPOINT


class Function(NamedTuple):
    """A function as Gradio knows it: by its number; and how many values it takes."""

    number: int
    inputs: int


class Visitors:
    """Who listens for what they asked for, and the folder that their pictures lie in.

    `queue` is Gradio's, set when there is one; `closed` ends whatever is drawn.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.queue: Any = None
        self.closed = False
        self._listening: Counter[str] = Counter()  # {session: open connections for its results}
        self._seen: dict[str, float] = {}  # {session: when it last asked or listened, in seconds}

    def _events(self) -> list[Any]:
        """Gradio's jobs that wait or run."""
        return list(self.queue.event_ids_to_events.values())

    def session_of(self, key: str) -> str:
        """The session that a visitor means with its name, or with the id of a job of theirs."""
        event = self.queue.event_ids_to_events.get(key)
        return event.session_hash if event else key

    def expects(self, key: str) -> bool:
        """Whether there is something to tell to those who listen for this session or job."""
        return self.session_of(key) in self.queue.pending_messages_per_session

    @contextmanager
    def listening(self, key: str) -> Iterator[None]:
        """Within it, a visitor is there: the one with this session, or who asked for this job."""
        session = self.session_of(key)
        self._listening[session] += 1
        try:
            yield
        finally:
            self._listening[session] -= 1
            if session in self._seen:
                self.asked(session)

    def asked(self, session: str) -> None:
        """Note that this session asks for something now."""
        self._seen[session] = time.monotonic()

    def notice(self) -> None:
        """Note that those sessions ask now that have a job and are not known yet.

        Gradio names some itself.
        """
        for event in self._events():
            self._seen.setdefault(event.session_hash, time.monotonic())

    def gone(self, session: str) -> bool:
        """Whether nobody has listened to this session for PATIENCE seconds."""
        now = time.monotonic()
        return not self._listening[session] and now - self._seen.get(session, now) > PATIENCE

    def waits_for(self, session: str | None) -> bool:
        """Whether somebody still waits for what this session asked for."""
        if self.closed or session is None or self.gone(session):
            return False
        return any(event.session_hash == session and event.alive for event in self._events())

    def jobs_of(self, session: str | None) -> int:
        """How many jobs of a session wait or run."""
        return sum(event.session_hash == session for event in self._events()) if session else 0

    async def make_room(self) -> None:
        """Drop the jobs of those who have gone, and forget sessions without a job."""
        sessions = {event.session_hash for event in self._events()}
        for session in filter(self.gone, sessions):
            await self.queue.clean_events(session_hash=session)
            self.queue.pending_messages_per_session.pop(session, None)
        kept = {session for session, count in self._listening.items() if count} | sessions
        self._seen = {session: when for session, when in self._seen.items() if session in kept}
        self._listening = Counter(
            {session: count for session, count in self._listening.items() if count}
        )

    def tidy(self) -> None:
        """Delete the oldest pictures until the rest has at most MOST_KEPT bytes."""
        found, kept = [], 0
        for path in Path(self.folder).rglob("*.*"):
            with suppress(FileNotFoundError):  # Gradio deletes them, too
                about = path.lstat()
                found.append((about.st_mtime, about.st_size, path))
        for _, size, path in sorted(found, reverse=True):
            kept += size
            if kept > MOST_KEPT and path.is_file():
                path.unlink(missing_ok=True)


class Gate:
    """ASGI middleware that passes on what the page needs and refuses everything else.

    Visitors hears from it who is there.
    """

    def __init__(self, app: Any, visitors: Visitors, functions: Mapping[str, Function]) -> None:
        """`functions` are those that visitors may run, {endpoint: Function}.

        The first is meant by a job that names none.
        """
        self.app, self.visitors, self.functions = app, visitors, [*functions.values()]
        self.calls = {f"{CALL}/{name}": function for name, function in functions.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":  # the server's start and end
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] in ("GET", "HEAD") and self.readable(path):
            await self.read(path, scope, receive, send)
        elif scope["method"] == "POST" and (path in (JOIN, CANCEL) or path in self.calls):
            await self.ask(path, scope, receive, send)
        else:
            await refuse(send, 403, REFUSAL)

    def readable(self, path: str) -> bool:
        """Whether anybody may read what is there: parts of the page, a picture that it drew, or
        what comes of a call.
        """
        inside = path.startswith(f"{FILE}{self.visitors.folder}/") and ".." not in path
        return inside or READABLE.fullmatch(path) is not None or self.answers(path)

    def answers(self, path: str) -> bool:
        """Whether a path is that of what comes of a call: the call's own, and the job's name."""
        return path.rpartition("/")[0] in self.calls

    async def read(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a GET on; while it lasts, somebody listens if it is for results."""
        key = None
        if path == LISTEN:
            key = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        elif self.answers(path):
            key = path.rpartition("/")[2]
        if key is None:
            await self.app(scope, self.until_closed(receive), send)
        elif not self.visitors.expects(key):
            await refuse(
                send, 404,
                "nothing was asked for under this name, or nobody listened for it in time; ask "
                "again",
            )  # fmt: skip
            return
        else:
            with self.visitors.listening(key):
                try:
                    await self.app(scope, self.until_closed(receive), send)
                except Exception as error:  # Gradio's, when a session ends within its answer
                    if getattr(error, "status_code", None) != 404:
                        raise
        if self.visitors.closed:
            with suppress(RuntimeError):  # it has been ended already
                await send({"type": "http.response.body", "body": b""})

    def until_closed(self, receive: Receive) -> Receive:
        """A `receive` to which every client has left once the page is closed.

        Some answers have no end of their own.
        """

        async def next_message() -> dict[str, Any]:
            message = asyncio.ensure_future(receive())
            try:
                while not message.done():
                    if self.visitors.closed:
                        return {"type": "http.disconnect"}
                    await asyncio.wait([message], timeout=POLL_SECONDS)
                return message.result()
            finally:
                message.cancel()

        return next_message

    async def ask(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a POST on, with what Gradio needs of its body."""
        try:
            body = await read_body(receive)
            asked = json.loads(body) if path == CANCEL else self.job(path, json.loads(body))
        except ConnectionError:
            return
        except OverflowError:
            await refuse(send, 413, f"this is too long; {LARGEST_BODY} bytes are the most")
            return
        except (ValueError, RecursionError) as error:
            await refuse(send, 422, f"this is no request for images ({reprlib.repr(str(error))})")
            return
        await self.visitors.make_room()
        session = asked.get("session_hash") if path != CANCEL else None
        if self.visitors.jobs_of(session) >= MOST_EACH:
            await refuse(
                send, 429,
                f"{MOST_EACH} drawings of yours wait or are drawn; ask again when one is done",
            )  # fmt: skip
            return
        if session:
            self.visitors.asked(session)
        body = json.dumps(asked).encode()
        await self.app(with_length(scope, len(body)), replay(body, receive), send)
        self.visitors.notice()

    def job(self, path: str, asked: Any) -> dict[str, Any]:
        """What Gradio needs to know of a job that is asked for at a path.

        Raises ValueError if it is none that the page's functions can take.
        """
        if not isinstance(asked, dict):
            raise ValueError("give an object with data, a list of choices")
        function = self.calls.get(path) or self.function(asked.get("fn_index"))
        data, inputs = asked.get("data"), function.inputs
        if not isinstance(data, list) or len(data) != inputs:
            raise ValueError(f"give data, a list of the {inputs} choices")
        session, trigger = asked.get("session_hash"), asked.get("trigger_id")
        if session is not None and not (
            isinstance(session, str) and re.fullmatch(r"[\w-]{1,64}", session, re.ASCII)
        ):
            raise ValueError("session_hash is up to 64 letters and digits")
        known = {
            "data": [plain(value) for value in data], "session_hash": session,
            "fn_index": function.number,
        }  # fmt: skip
        return known | ({"trigger_id": trigger} if type(trigger) is int else {})

    def function(self, number: object) -> Function:
        """The function of this number, the first for None. Raises ValueError if there is none."""
        if number is None:
            return self.functions[0]
        for function in self.functions:
            if type(number) is int and function.number == number:
                return function
        known = ", ".join(str(function.number) for function in self.functions)
        raise ValueError(f"fn_index is {reprlib.repr(number)}; give one of {known}")


def plain(value: Any) -> Any:
    """A value of JSON, with every dict and every list within a list as a text.

    Gradio fetches what some dicts name.
    """
    if isinstance(value, list):
        return [reprlib.repr(item) if isinstance(item, (dict, list)) else item for item in value]
    return reprlib.repr(value) if isinstance(value, dict) else value


async def read_body(receive: Receive) -> bytes:
    """A request's body.

    Raises OverflowError for more than LARGEST_BODY bytes, ConnectionError if the client left.
    """
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionError
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > LARGEST_BODY:
            raise OverflowError
    return body


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body first, then what the client does."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> dict[str, Any]:
        return waiting.pop() if waiting else await receive()

    return next_message


def with_length(scope: Scope, length: int) -> Scope:
    """The scope of a request whose body has so many bytes."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return scope | {"headers": [*headers, (b"content-length", str(length).encode())]}


async def refuse(send: Send, status: int, detail: str) -> None:
    """Answer with an error, in the form that Gradio's clients read, and close the connection."""
    body = json.dumps({"detail": detail}).encode()
    headers = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
