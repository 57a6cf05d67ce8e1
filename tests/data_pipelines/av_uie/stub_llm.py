"""A chat-completion server on this machine that answers as a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any, dict[str, str]]  # status, body (str as it is, else JSON), headers


def completion(text: object, usage: object = "count") -> Answer:
    """A well-formed reply."""
    body: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
    if usage == "count":
        usage = {"prompt_tokens": 100, "completion_tokens": 20}
    return 200, body | ({"usage": usage} if usage is not None else {}), {}


def good(request: dict[str, Any]) -> Answer:
    """What a careful model would answer: the facts of the request and the closing sentence. After a correction too."""
    asked = next(m["content"] for m in reversed(request["messages"]) if m["content"].startswith("Task: "))
    facts, _, closing = asked.partition("\nFacts: ")[2].partition("\nClosing sentence: ")
    return completion(f"{facts}\n\n{closing}")


class Stub:
    """`behave(request, times)` decides each answer; `times` is how often this very request came before."""

    def __init__(self, behave: Callable[[dict[str, Any], int], Answer] = lambda request, times: good(request)):
        self.behave, self.lock = behave, threading.Lock()
        self.seen: Counter[str] = Counter()  # Idempotency-Key -> requests
        self.headers: list[dict[str, str]] = []
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.busy = self.busiest = 0
        self.url = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
            key = handler.headers["Idempotency-Key"]
            times = self.seen[key]
            self.seen[key] += 1
            self.times.append(time.monotonic())
            self.headers.append(dict(handler.headers))
            self.requests.append({"path": handler.path, **request})
        try:
            status, body, headers = self.behave(request, times)
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            pass  # the client has given up waiting
        finally:
            with self.lock:
                self.busy -= 1


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """The stub behind http://127.0.0.1:port/v1."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            stub.handle(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
