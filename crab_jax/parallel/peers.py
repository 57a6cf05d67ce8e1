"""Who of a run's processes is still there: each holds a connection to process 0, which the kernel closes with it.

A process that is killed, on any host, is known to all the others at once, by its name; one that only stands still
(SIGSTOP, a suspended machine) keeps its connection and is known to be silent. JAX's own heartbeat knows neither: it
cannot tell them apart, and ends the process in C++ before a word can be said.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from crab_jax.io import locks
from crab_jax.io.errors import InputError, printable

KEY = "crab_jax/peers"  # of the store that all processes share, where process 0 says where it listens
CONNECT_SECONDS = 120.0
BEAT_SECONDS = 0.5  # how often a process asks process 0 whether it is there
SILENT_SECONDS = 5.0  # after which one that does not answer is called silent
HOST_SECONDS = 60  # after which a host that no packet comes from is given up
FAREWELL_SECONDS = 5.0  # how long the others may take to hear why a process leaves


class Address(NamedTuple):
    """Where process 0 listens. secret: what only the processes of this run know."""

    host: str
    port: int
    secret: str


def name_of(index: int, host: str = "") -> str:
    """What a process is called in messages."""
    return f"process {index} on {host or socket.gethostname()}"


class _Link:
    """A connection to one other process, on which lines go."""

    def __init__(self, connection: socket.socket, name: str = ""):
        self.connection, self.name, self.heard = connection, name, time.monotonic()
        self.asked = True  # process 0 first says that it knows this one
        self.done = False
        self._rest = b""
        connection.settimeout(FAREWELL_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", HOST_SECONDS // 3),
            ("TCP_KEEPINTVL", HOST_SECONDS // 6),
            ("TCP_KEEPCNT", 4),
            ("TCP_USER_TIMEOUT", 1000 * HOST_SECONDS),
        ):
            if hasattr(socket, option):  # Linux has them all
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, line: str) -> None:
        """Send a line; to one that is gone, nothing: reading will tell."""
        try:
            self.connection.sendall(line.encode() + b"\n")
        except OSError:
            pass

    def lines(self) -> list[str] | None:
        """What has come since; None when the connection is closed. Raises OSError."""
        if not (found := self.connection.recv(65536)):
            return None
        *whole, self._rest = (self._rest + found).split(b"\n")
        self.heard = time.monotonic()
        return [line.decode("utf-8", "replace") for line in whole]

    def hello(self) -> Any:
        """The first line, of one who sends nothing else before it is answered. Raises OSError, ValueError."""
        while not (lines := self.lines()):
            if lines is None or len(self._rest) > 1000:
                raise ValueError("no line")
        return json.loads(lines[0])

    def drain(self, until: float) -> None:
        """Say that nothing more comes, and wait until the other one has read what came."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while (left := until - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(65536):
                    return
        except OSError:
            pass


class Peers:
    """The other processes of a run, seen from one of them, by a thread that ends this process when one of them died or
    failed.

    index: of this process.  links: to process 0, or, there, to all the others by their index.
    """

    def __init__(self, index: int, links: dict[int, _Link]):
        self.index, self.links = index, links
        self._told = ""  # which of the others are silent, as process 0 says
        self._finished = False  # this process has done its work
        self._over = threading.Event()  # all have
        self._ending = threading.Lock()  # of the one thread that ends this process
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def silent(self) -> str:
        """Which of the others do not answer, and for how long: "process 2 on b has not answered for 14 s", or ""."""
        now = time.monotonic()
        ours = [
            f"{link.name} has not answered for {now - link.heard:.0f} s"
            for link in self.links.values()
            if now - link.heard > SILENT_SECONDS
        ]
        return "; ".join(ours) or self._told

    def finish(self) -> None:
        """Wait until all have done their work, after which nobody is missed."""
        self._finished = True
        self._over.wait()

    def fail(self, code: int, why: str) -> NoReturn:
        """End all the others with this exit code and reason, then this process, which has said why itself."""
        self._end(code, f"stopped with the others: {name_of(self.index)}: {why}", quiet=True)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self.links.values():
                selector.register(link.connection, selectors.EVENT_READ, link)
            beat = 0.0
            while not self._over.is_set():
                for key, _ in selector.select(BEAT_SECONDS):
                    self._hear(key.data)
                if time.monotonic() - beat >= BEAT_SECONDS:
                    beat = time.monotonic()
                    self._beat()

    def _beat(self) -> None:
        """Ask process 0 whether it is there, unless it still owes an answer; say once when all is done."""
        for link in self.links.values():
            if self.index and self._finished and not link.done:
                link.done = True
                link.send("done")
            elif self.index and not link.asked:
                link.asked = True
                link.send("there?")
        if not self.index and self._finished and all(link.done for link in self.links.values()):
            for link in self.links.values():
                link.send("done")
            self._over.set()

    def _hear(self, link: _Link) -> None:
        try:
            lines = link.lines()
        except OSError as error:
            lost = not isinstance(error, ConnectionError)  # no answer, rather than one that it is closed
            self._end(1, _gone(link.name, f"nothing comes from its host for {HOST_SECONDS} s" if lost else ""))
        if lines is None:
            self._end(1, _gone(link.name))
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "there?":
                link.send(f"here {self.silent()}")
            elif word == "here":
                link.asked, self._told = False, rest
            elif word == "done" and self.index:
                self._over.set()
            elif word == "done":
                link.done = True
            elif word == "end":
                code, _, why = rest.partition(" ")
                self._end(int(code), why)

    def _end(self, code: int, why: str, quiet: bool = False) -> NoReturn:
        self._ending.acquire()  # never given free: the second thread that comes here waits for the end
        if not quiet:
            print(f"error: {why}", file=sys.stderr, flush=True)
            # What C++ says of the same death comes before this line, or not at all.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        until = time.monotonic() + FAREWELL_SECONDS
        for link in self.links.values():
            link.send(f"end {code} {printable(why):.2000}")
        for link in self.links.values():
            link.drain(until)
        leave(code)


def _gone(name: str, how: str = "") -> str:
    return (
        f"{name} is gone ({how or 'it was killed, or ended without a word'}), so this one ends too; start all "
        "processes again: they go on from what is saved"
    )


def leave(code: int) -> NoReturn:
    """End this process at once, without the clean-up that waits for others."""
    locks.release_all()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def meet(
    index: int, count: int, coordinator: str, put: Callable[[str, str], Any], get: Callable[[str, int], str]
) -> Peers:
    """Connect the `count` processes of a run. coordinator: "host:port" of process 0, whose host is known to all.

    put, get: of the store that all share; `get` waits for so many milliseconds. Raises InputError when one does not
    come.
    """
    if index == 0:
        with listen() as listener:
            address = Address(socket.gethostname(), listener.getsockname()[1], secrets.token_hex(16))
            put(KEY, json.dumps(address))
            links = _all(listener, count, address.secret)
    else:
        address = Address(*json.loads(get(KEY, int(1000 * CONNECT_SECONDS))))
        links = {0: _reach(index, coordinator.rpartition(":")[0].strip("[]"), address)}
    _hold_aborts()
    return Peers(index, links)


def listen(port: int = 0) -> socket.socket:
    """A listener on all interfaces, at a free port unless one is given. Raises OSError."""
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=1024
    )


def _all(listener: socket.socket, count: int, secret: str) -> dict[int, _Link]:
    """The connections of all other processes, each of which has said the secret, its index and its host."""
    links: dict[int, _Link] = {}
    until = time.monotonic() + CONNECT_SECONDS
    while len(links) < count - 1:
        listener.settimeout(max(0.1, until - time.monotonic()))
        try:
            link = _Link(listener.accept()[0])
            secret_said, index, host = link.hello()
            if secret_said == secret and index in range(1, count):
                link.name = name_of(index, host)
                link.send("here ")
                links[index] = link
        except TimeoutError:
            missing = [str(one) for one in range(1, count) if one not in links]
            if time.monotonic() >= until:
                raise InputError(
                    name_of(0),
                    f"port {listener.getsockname()[1]}",
                    f"process {', '.join(missing):.200} did not connect within {CONNECT_SECONDS:.0f} s",
                    "see what it says; all ports between the hosts of a run must be open",
                ) from None
        except (OSError, ValueError, TypeError):  # not one of ours
            pass
    return links


def _reach(index: int, host: str, address: Address) -> _Link:
    try:
        link = _Link(socket.create_connection((host, address.port), CONNECT_SECONDS), name_of(0, address.host))
    except OSError as error:
        raise InputError(
            name_of(index),
            f"{host}:{address.port}",
            f"process 0 cannot be reached there ({error})",
            "open all ports between the hosts of a run",
        ) from error
    link.send(json.dumps([address.secret, index, socket.gethostname()]))
    return link


def _hold_aborts() -> None:
    """Let a thread that aborts this process wait for six seconds first.

    When process 0 goes, its store goes, and the C++ client of the store aborts at once (its callback, which could say
    otherwise, cannot be one of Python's in jaxlib 0.10). The thread of `Peers` knows why and has the last word in that
    time. The handler must be C: `sleep`, to which the number of the signal, 6, is the seconds.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
