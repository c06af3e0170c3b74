"""An OpenAI-compatible server on this machine, as badly behaved as a test wants it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DEADLINE = 60.0


def said(content: str | None = "So \\boxed{4}", *, finish: str = "stop", tokens: int = 7, **message: Any) -> dict:
    """The body of a good answer."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "stand-in-1",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 11, "completion_tokens": tokens, "total_tokens": 11 + tokens},
    }


def fault(message: str, code: Any = None) -> dict:
    """The body of an error."""
    return {"error": {"message": message, "type": "error", "code": code}}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the server sends. held: nothing, ever: the request stays open until the server is shut down."""

    body: Any = field(default_factory=said)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    held: bool = False


@dataclass(kw_only=True)
class Seen:
    """A request as it came in."""

    at: float
    path: str
    key: str | None
    headers: dict[str, str]
    body: dict[str, Any]
    answered: bool = False

    @property
    def question(self) -> str:
        return self.body["messages"][-1]["content"]


class ChatServer:
    """reply: gets a request and how many of the same question and seed came before it."""

    def __init__(self, reply: Callable[[Seen, int], Reply]) -> None:
        self.reply = reply
        self.seen: list[Seen] = []
        self.most_at_once = self._now = 0
        self._lock, self._over = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.handle(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # with the usual 5, connections made at once are reset now and then
            daemon_threads = True

        self.http = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    @property
    def answered(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.answered]

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        authorization = handler.headers.get("Authorization")
        key = authorization.removeprefix("Bearer ") if authorization else None
        seen = Seen(at=time.monotonic(), path=handler.path, key=key, headers=dict(handler.headers), body=body)
        with self._lock:
            before = sum((s.question, s.body.get("seed")) == (seen.question, body.get("seed")) for s in self.seen)
            self.seen.append(seen)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        reply = self.reply(seen, before)
        with self._lock:
            self._now -= 1
        if reply.held:
            self._over.wait(DEADLINE)
            handler.close_connection = True
            return
        data = reply.body.encode() if isinstance(reply.body, str) else json.dumps(reply.body).encode()
        seen.answered = True
        handler.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def close(self) -> None:
        self._over.set()
        self.http.shutdown()
        self.http.server_close()


@contextmanager
def chat_server(
    reply: Callable[[Seen, int], Reply] = lambda seen, before: Reply(),
) -> Iterator[ChatServer]:
    server = ChatServer(reply)
    try:
        yield server
    finally:
        server.close()
