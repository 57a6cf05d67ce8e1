"""Detection of failed processes of a run.

Every process keeps a connection to process 0, which the kernel closes when the process exits. When a process is killed,
on any host, all others learn its name at once; one that only stands still (SIGSTOP, a suspended machine) keeps its
connection and is reported as silent. JAX's own heartbeat cannot tell the two apart and ends the process in C++ before a
message can be printed.
"""

from __future__ import annotations

import contextlib
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

KEY = "crab_jax/peers"  # in the shared key-value store; process 0 publishes its address there
CONNECT_SECONDS = 120.0
BEAT_SECONDS = 0.5  # how often a process pings process 0
SILENT_SECONDS = 5.0  # after which a process that does not answer is reported as silent
HOST_SECONDS = 60  # after which a host that sends no packets is given up
FAREWELL_SECONDS = 5.0  # how long the others may take to receive the reason of an exit


class Address(NamedTuple):
    """The address on which process 0 listens; `secret` is known only to the processes of this run."""

    host: str
    port: int
    secret: str


def name_of(index: int, host: str = "") -> str:
    """Return the name of a process for messages."""
    return f"process {index} on {host or socket.gethostname()}"


class _Link:
    """A connection to one other process, carrying lines of text."""

    def __init__(self, connection: socket.socket, name: str = ""):
        self.connection, self.name, self.heard = connection, name, time.monotonic()
        self.asked = True  # process 0 first confirms the connection
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
        """Send a line. A closed connection is ignored here; reading reports it."""
        with contextlib.suppress(OSError):
            self.connection.sendall(line.encode() + b"\n")

    def lines(self) -> list[str] | None:
        """Return the lines received since the last call; None when the connection is closed. Raises OSError."""
        if not (received := self.connection.recv(65536)):
            return None
        *complete, self._rest = (self._rest + received).split(b"\n")
        self.heard = time.monotonic()
        return [line.decode("utf-8", "replace") for line in complete]

    def hello(self) -> Any:
        """Return the JSON value of the first line, after which the peer waits. Raises OSError, ValueError."""
        while not (lines := self.lines()):
            if lines is None or len(self._rest) > 1000:
                raise ValueError("no line")
        return json.loads(lines[0])

    def drain(self, until: float) -> None:
        """Announce that nothing more comes, and wait until the peer has read everything."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while (left := until - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(65536):
                    return


class Peers:
    """The connections of a process to the others, and the thread that ends this process when another fails or dies.

    index: of this process. links: to process 0; on process 0, to all others by index.
    """

    def __init__(self, index: int, links: dict[int, _Link]):
        self.index, self.links = index, links
        self._silent_at_primary = ""  # the silent processes as reported by process 0
        self._finished = False  # whether this process has finished its work
        self._all_finished = threading.Event()  # whether all have
        self._ending = threading.Lock()  # held by the thread that ends this process
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def silent(self) -> str:
        """Return the processes that do not answer, such as "process 2 on b has not answered for 14 s", or ""."""
        now = time.monotonic()
        own_links = [
            f"{link.name} has not answered for {now - link.heard:.0f} s"
            for link in self.links.values()
            if now - link.heard > SILENT_SECONDS
        ]
        return "; ".join(own_links) or self._silent_at_primary

    def finish(self) -> None:
        """Wait until all processes have finished; after that, none may end another by leaving."""
        self._finished = True
        self._all_finished.wait()

    def fail(self, code: int, why: str) -> NoReturn:
        """End all other processes with this exit code and reason, then this one, which has printed the reason."""
        self._end(code, f"stopped with the others: {name_of(self.index)}: {why}", quiet=True)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self.links.values():
                selector.register(link.connection, selectors.EVENT_READ, link)
            beat = 0.0
            while not self._all_finished.is_set():
                for key, _ in selector.select(BEAT_SECONDS):
                    self._hear(key.data)
                if time.monotonic() - beat >= BEAT_SECONDS:
                    beat = time.monotonic()
                    self._beat()

    def _beat(self) -> None:
        """Ping process 0 unless it still owes an answer; announce once when all work is done."""
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
            self._all_finished.set()

    def _hear(self, link: _Link) -> None:
        try:
            lines = link.lines()
        except OSError as error:
            lost = not isinstance(
                error, ConnectionError
            )  # the host does not answer, rather than having closed the connection
            self._end(1, _gone(link.name, f"nothing comes from its host for {HOST_SECONDS} s" if lost else ""))
        if lines is None:
            self._end(1, _gone(link.name))
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "there?":
                link.send(f"here {self.silent()}")
            elif word == "here":
                link.asked, self._silent_at_primary = False, rest
            elif word == "done" and self.index:
                self._all_finished.set()
            elif word == "done":
                link.done = True
            elif word == "end":
                code, _, why = rest.partition(" ")
                self._end(int(code), why)

    def _end(self, code: int, why: str, quiet: bool = False) -> NoReturn:
        self._ending.acquire()  # never released: a second thread waits here for the exit
        if not quiet:
            print(f"error: {why}", file=sys.stderr, flush=True)
            # C++ messages about the same failure are printed before this line or not at all.
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
    """Connect the `count` processes of a run and return this process's `Peers`.

    coordinator: "host:port" of process 0, whose host all processes know. put, get: write and read the shared key-value
    store; `get` waits for the given number of milliseconds. Raises InputError when a process does not connect.
    """
    if index == 0:
        with listen() as listener:
            address = Address(socket.gethostname(), listener.getsockname()[1], secrets.token_hex(16))
            put(KEY, json.dumps(address))
            links = _accept_all(listener, count, address.secret)
    else:
        address = Address(*json.loads(get(KEY, int(1000 * CONNECT_SECONDS))))
        links = {0: _connect(index, coordinator.rpartition(":")[0].strip("[]"), address)}
    _hold_aborts()
    return Peers(index, links)


def listen(port: int = 0) -> socket.socket:
    """Return a listening socket on all interfaces, at a free port unless one is given. Raises OSError."""
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=1024
    )


def _accept_all(listener: socket.socket, count: int, secret: str) -> dict[int, _Link]:
    """Return the connections of all other processes; each has sent the secret, its index and its host."""
    links: dict[int, _Link] = {}
    until = time.monotonic() + CONNECT_SECONDS
    while len(links) < count - 1:
        listener.settimeout(max(0.1, until - time.monotonic()))
        try:
            link = _Link(listener.accept()[0])
            given_secret, index, host = link.hello()
            if given_secret == secret and index in range(1, count):
                link.name = name_of(index, host)
                link.send("here ")
                links[index] = link
        except TimeoutError:
            missing = [str(number) for number in range(1, count) if number not in links]
            if time.monotonic() >= until:
                raise InputError(
                    name_of(0),
                    f"port {listener.getsockname()[1]}",
                    f"process {', '.join(missing):.200} did not connect within {CONNECT_SECONDS:.0f} s",
                    "read its output; all ports between the hosts of a run must be open",
                ) from None
        except (OSError, ValueError, TypeError):  # not a process of this run
            pass
    return links


def _connect(index: int, host: str, address: Address) -> _Link:
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
    """Delay an abort of this process by six seconds.

    When process 0 exits, its key-value store closes, and the C++ client of the store aborts at once (jaxlib 0.10 does
    not accept a Python callback for this). The delay lets the thread of `Peers` print the reason first. The signal
    handler must be a C function: `sleep`, which takes the signal number, 6, as its seconds.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
