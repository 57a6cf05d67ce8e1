"""Explicit-reasoning targets from an LLM behind an OpenAI-compatible endpoint; no answer is paid for twice.

Every answer is appended to a journal, keyed by the Example's id and the hash of the whole request, before it is used.
The same command continues a run that stopped for any reason: answers in the journal are not requested again. An answer
that verify.py refuses is requested again with the reasons (as a new request, so also only once).

It cannot be known whether a request that timed out, or was cut off by a hard kill, is billed. Such requests are counted
as `lost`; each carries its hash as Idempotency-Key for servers that support it. Workers finish the requests they have
sent when asked to stop, so ctrl-C loses none.

The key is read from the environment, sent in one header to one host (redirects are refused), and blanked out of all
responses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import hashlib
import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from crab_jax.io import paths
from crab_jax.io.bounds import Flag, Text, Whole
from crab_jax.io.errors import InputError
from crab_jax.io.files import append, append_line, write_whole
from crab_jax.io.locks import locked_file
from crab_jax.io.structured import LIST, check, read_bytes, refuse_special, strict_json
from crab_jax.tasks import TASKS
from data_pipelines.av_uie import labels, prompts, verify
from data_pipelines.av_uie.prompts import Messages
from data_pipelines.examples import Example

PARAMETERS = {"temperature": 0.3, "max_tokens": 400}
CHARACTERS_PER_TOKEN = 4  # for estimates, and for servers that do not report usage
_LARGEST = 4_000_000  # bytes of one reply
_LONGEST_WAIT = 60.0  # seconds of backoff; a server may ask for more with Retry-After
_PASSING = (408, 409, 425, 429)  # temporary statuses, besides all above 499
_SECRET = 8  # shortest key that is blanked out; local servers accept words such as "EMPTY"


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An endpoint and its parameters.

    url: ends before /chat/completions. Prices are per million tokens, timeout and backoff in seconds.
    """

    url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(PARAMETERS))
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 1.0
    per_minute: float = 0.0  # requests; 0 = as fast as the workers go
    price_in: float = 0.0
    price_out: float = 0.0
    budget: float = 0.0  # 0 = none

    def __post_init__(self) -> None:
        """Raise InputError for bad values, without the URL or the key in it, because either may hold a secret."""
        try:
            parts = urlsplit(self.url)
            clean = (
                parts.scheme in ("http", "https")
                and parts.hostname
                and not (parts.username or parts.password or parts.query or parts.fragment)
            )
        except ValueError:
            clean = False
        if not clean:
            raise InputError(
                "--url",
                "",
                "is no plain http(s) address",
                "give it as https://host/v1, without a key, user or query in it",
            )
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key:
            raise InputError(
                "the API key",
                "",
                "holds a space, a line end or a character that no key has",
                "set the environment variable to the key alone",
            )
        if not self.model:
            raise InputError("--model", "", "is empty", "name a model of the endpoint")
        if self.budget and not (self.price_in or self.price_out):
            raise InputError("--budget", "", "cannot be kept without prices", "give --price-in and --price-out")

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """Return the cost of these numbers of tokens, in the currency of the prices."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def request_hash(self, messages: Messages) -> str:
        """Return the SHA-256 of everything that determines an answer: model, parameters and messages."""
        request = {"model": self.model, "messages": messages, **self.parameters}
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class Reply(NamedTuple):
    """One answer and the tokens it used; `estimated` when the server did not report them."""

    text: str
    tokens_in: int
    tokens_out: int
    estimated: bool


class Failure(Exception):
    """A request without a usable answer.

    passing: whether another attempt may succeed. wait: seconds that the server asks for. billed: it may have been
    charged.
    """

    def __init__(self, what: str, passing: bool, wait: float = 0.0, billed: bool = False):
        super().__init__(what)
        self.what, self.passing, self.wait, self.billed = what, passing, wait, billed


class Stopped(Exception):
    """The run was asked to stop before this request was sent."""


JOURNAL = {"id": Text(1), "request": Text(1, 200), "lost?": Text()}  # schema of a line of the journal
ANSWER = {**JOURNAL, "text": Text(most=2**22), "tokens_in": Whole(), "tokens_out": Whole(), "estimated": Flag()}


class Journal:
    """The append-only JSONL file of all answers, for one process at a time; a record is on disk when `add` returns.

    In a bucket it is there within seconds: the object is written whole each time.

    answers: (id, request hash) -> reply. tokens_in, tokens_out: totals. lost: requests that may have been billed
    without an answer. An incomplete last line, left by a kill or a full disk, is cut off on opening. Raises InputError
    for a file in use and for a damaged line elsewhere.
    """

    def __init__(self, path: str | Path):
        self.path = paths.at(path)
        self._lock, self._held = threading.Lock(), contextlib.ExitStack()
        if paths.exists(self.path):
            refuse_special(self.path, "--journal", LIST)
        self._held.enter_context(locked_file(self.path, "--journal"))
        self._file: int | None = None  # the open file on a disk
        if not paths.is_remote(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.answers: dict[tuple[str, str], Reply] = {}
        self.lost = self.tokens_in = self.tokens_out = 0
        self._load()

    def _load(self) -> None:
        data = read_bytes(self.path, "--journal", LIST) if paths.exists(self.path) else b""
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(self.path, end) if self._file is not None else write_whole(self.path, data[:end])
        for number, line in enumerate(data[:end].splitlines(), 1):
            try:
                record = strict_json(line.decode())
                check(record, JOURNAL if "lost" in record else ANSWER, f"{self.path}:{number}")
                self._keep(record)
            except (ValueError, TypeError):
                self.close()
                raise InputError(
                    f"{self.path}:{number}",
                    "",
                    "is no record of this journal",
                    "remove the line; its answer is requested again",
                ) from None

    def _keep(self, record: dict[str, Any]) -> None:
        if "lost" in record:
            self.lost += 1
            return
        reply = Reply(**{field: record[field] for field in Reply._fields})
        self.tokens_in, self.tokens_out = self.tokens_in + reply.tokens_in, self.tokens_out + reply.tokens_out
        self.answers[record["id"], record["request"]] = reply

    def add(self, record: dict[str, Any]) -> None:
        """Append one record and wait until it is on disk; in a bucket it is within seconds."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self._lock:
            if self._file is None:
                append_line(self.path, record)
            else:
                append(self._file, line, str(self.path))
                os.fsync(self._file)
            self._keep(record)

    def close(self) -> None:
        """Release the file for another run; a later answer raises OSError instead of being written elsewhere."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = -1
            paths.settle()
            self._held.close()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Return None, so that the redirect is an HTTPError."""
        return


class Client:
    """Sends requests to an endpoint unless the journal has the answer.

    It is thread-safe; setting `stop` makes waiting threads give up.
    """

    def __init__(self, endpoint: Endpoint, journal: Journal):
        self.endpoint, self.journal = endpoint, journal
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()  # of this run: asked, cached, retried, tokens_in, tokens_out
        self._lock = threading.Lock()
        self._next = 0.0  # earliest time.monotonic() of the next request
        self._reserved = 0.0  # largest possible cost of the pending requests
        self._opener = urllib.request.build_opener(_NoRedirect)

    def spent(self) -> float:
        """Return the cost of all answers in the journal, including those of earlier runs."""
        return self.endpoint.cost(self.journal.tokens_in, self.journal.tokens_out)

    def ask(self, id: str, messages: Messages) -> str:
        """Return the answer to a request, from the journal if it was answered before.

        Raises Failure after the last attempt, Stopped, and InputError for what stops the whole run: a refused key, an
        unknown model or address, a spent budget.
        """
        digest = self.endpoint.request_hash(messages)
        if known := self.journal.answers.get((id, digest)):
            self._count(cached=1)
            return known.text
        most = self._most(messages)
        for attempt in range(self.endpoint.attempts):
            self._wait_for_turn()
            self._reserve(most)
            try:
                reply = self._post(messages, digest)
            except Failure as failure:
                if failure.billed:
                    self.journal.add({"id": id, "request": digest, "lost": failure.what})
                if not failure.passing or attempt + 1 == self.endpoint.attempts:
                    raise
                self._count(retried=1)
                self._hold(failure.wait)
                pause = min(_LONGEST_WAIT, self.endpoint.backoff * 2**attempt) * random.uniform(0.5, 1.0)
                if self.stop.wait(max(pause, failure.wait)):
                    raise Stopped from None
            else:
                self.journal.add({"id": id, "request": digest, "model": self.endpoint.model, **reply._asdict()})
                self._count(asked=1, tokens_in=reply.tokens_in, tokens_out=reply.tokens_out)
                return reply.text
            finally:
                self._reserve(-most)
        raise AssertionError("attempts must be positive")

    def _count(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)

    def _most(self, messages: Messages) -> float:
        tokens_out = self.endpoint.parameters.get("max_tokens", PARAMETERS["max_tokens"])
        return self.endpoint.cost(tokens_in(messages), tokens_out)

    def _reserve(self, cost: float) -> None:
        """Raise InputError when a request of this cost could exceed the budget; negative costs undo reservations."""
        with self._lock:
            budget = self.endpoint.budget
            if budget and cost > 0 and self.spent() + self._reserved + cost > budget:
                raise InputError(
                    "--budget",
                    "",
                    f"{budget:g} may be exceeded by the next request",
                    "raise it and run the same command again; what was answered is kept",
                )
            self._reserved += cost

    def _wait_for_turn(self) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                delay = self._next - now
                if delay <= 0:
                    self._next = now + (60 / self.endpoint.per_minute if self.endpoint.per_minute else 0.0)
                    break
            if self.stop.wait(delay):
                raise Stopped
        if self.stop.is_set():
            raise Stopped

    def _hold(self, seconds: float) -> None:
        """Send nothing from any worker for this many seconds, as the server asked."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def _post(self, messages: Messages, digest: str) -> Reply:
        body = json.dumps({"model": self.endpoint.model, "messages": messages, **self.endpoint.parameters}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Idempotency-Key": digest}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        request = urllib.request.Request(f"{self.endpoint.url.rstrip('/')}/chat/completions", body, headers)
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout) as response:
                data = self._read(response)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (TimeoutError, urllib.error.URLError, http.client.HTTPException, OSError) as error:
            late = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
            # A connection that breaks after the request was sent may be billed; a refused connection cannot.
            sent = late or not isinstance(error, urllib.error.URLError)
            what = "timed out" if late else self._clean(f"{type(error).__name__}: {getattr(error, 'reason', error)}")
            raise Failure(what, passing=True, billed=sent) from None
        return self._reply(data, messages)

    def _read(self, response: Any) -> str:
        """Return the body, with limits on the time of the whole reply and on its size."""
        deadline, pieces, size = time.monotonic() + self.endpoint.timeout, [], 0
        while piece := response.read1(65536):
            size += len(piece)
            if time.monotonic() > deadline:
                raise TimeoutError
            if size > _LARGEST:
                raise Failure("the reply is too large", passing=True, billed=True)
            pieces.append(piece)
        return self._clean(b"".join(pieces).decode("utf-8", "replace"))

    def _clean(self, text: str) -> str:
        """Remove the key from external text, because some servers repeat it in their errors."""
        return text.replace(self.endpoint.key, "***") if len(self.endpoint.key) >= _SECRET else text

    def _reply(self, data: str, messages: Messages) -> Reply:
        try:
            content = strict_json(data)
            text = content["choices"][0]["message"]["content"]
            usage = content.get("usage") or {}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Failure("the reply is not that of a chat completion", passing=True, billed=True) from None
        if not isinstance(text, str):
            raise Failure("the reply has no text", passing=True, billed=True)
        counts = usage if isinstance(usage, dict) else {}
        used: list[Any] = [counts.get(name) for name in ("prompt_tokens", "completion_tokens")]
        known = all(type(count) is int and count >= 0 for count in used)
        guess = [tokens_in(messages), len(text) // CHARACTERS_PER_TOKEN + 1]
        read, written = used if known else guess
        return Reply(" ".join(text.split()), read, written, estimated=not known)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """Return the exception for an HTTP error: InputError stops the run, a Failure fails or retries this request."""
        body = ""
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            body = self._clean(" ".join(error.read(20_000).decode("utf-8", "replace").split()))
        what = f"HTTP {error.code}" + (f" ({body[:200]})" if body else "")
        if "insufficient_quota" in body or error.code == 402:
            return InputError("the endpoint", "", what, "there is no credit left: add some and run the same command")
        if error.code in (401, 403):
            return InputError("the endpoint", "", f"refuses the key: {what}", "check the key's environment variable")
        if error.code == 404 or 300 <= error.code < 400:
            return InputError("the endpoint", "", what, "check --url (it ends in /v1, no redirects) and --model")
        passing = error.code in _PASSING or error.code >= 500
        return Failure(what, passing, _retry_after(error.headers.get("Retry-After")))


def _retry_after(value: str | None) -> float:
    """Return the seconds of a Retry-After header, which holds a number or a date; 0 if it cannot be parsed."""
    if not value:
        return 0.0
    with contextlib.suppress(ValueError):
        return min(3600.0, max(0.0, float(value)))
    with contextlib.suppress(ValueError, TypeError):
        return min(3600.0, max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()))
    return 0.0


def tokens_in(messages: Messages) -> int:
    """Return the approximate number of tokens of a request."""
    return sum(len(message["content"]) for message in messages) // CHARACTERS_PER_TOKEN + 4 * len(messages)


def annotated(
    example: Example, client: Client, root: str | Path | None, vocabulary: Sequence[str], corrections: int
) -> Example:
    """Return the Example with the LLM's target: the first that agrees with the label, else the last attempt."""
    messages = prompts.messages(example, root)
    for left in range(corrections, -1, -1):
        text = client.ask(example.id, messages)
        answer = dataclasses.replace(
            example, target=text, meta={**example.meta, "reasoning": f"{verify.LLM}{client.endpoint.model}"}
        )
        problems = verify.problems(answer, root, vocabulary)
        if not problems or not left:
            return answer
        messages = prompts.correction(messages, text, problems)
    raise AssertionError("corrections must not be negative")


class Outcome(NamedTuple):
    """The result of a run: Examples with targets, in order, and {id: reason} of those without an answer."""

    examples: list[Example]
    failed: dict[str, str]


def asked_about(example: Example) -> bool:
    """Return whether an Example needs an LLM: it has reasoning to write and a label with enough information."""
    return bool(TASKS[example.task].answer_start) and not labels.weak(example)


def run(
    examples: Sequence[Example],
    client: Client,
    root: str | Path | None = None,
    corrections: int = 1,
    workers: int = 8,
    progress: Callable[[int], None] | None = None,
    stopping: Callable[[], None] | None = None,
) -> Outcome:
    """Return targets for every Example that needs one, with `workers` concurrent requests.

    An Example whose request fails for good is left out and listed. progress: called with the number of finished ones, a
    few times a second. A first KeyboardInterrupt calls `stopping`, lets pending requests finish and is then raised; a
    second one is raised at once. Raises InputError for what stops a run (see Client.ask), and when no requests are
    answered any more.
    """
    vocabulary = {task: sorted(names) for task, names in verify.vocabulary_of(verify.usable(examples)).items()}
    todo, lock = iter([(i, e) for i, e in enumerate(examples) if asked_about(e)]), threading.Lock()
    results: queue.Queue[tuple[int, Example | Exception] | None] = queue.Queue()

    def work() -> None:
        while not client.stop.is_set():
            with lock:
                item = next(todo, None)
            if item is None:
                break
            place, example = item
            try:
                results.put((place, annotated(example, client, root, vocabulary.get(example.task, ()), corrections)))
            except Stopped:
                break
            except Failure as failure:
                results.put((place, failure))
            except Exception as error:  # concerns all requests: no worker may start another
                client.stop.set()
                results.put((place, error))
        results.put(None)

    for _ in range(workers):
        threading.Thread(target=work, daemon=True).start()
    done: dict[int, Example] = {}
    failed: dict[str, str] = {}
    fatal: BaseException | None = None
    active, barren = workers, 0  # barren: number of failures since the last answer
    while active:
        try:
            if progress:
                progress(len(done) + len(failed))
            item = results.get(timeout=0.2)
        except queue.Empty:
            continue
        except KeyboardInterrupt as interrupt:
            if client.stop.is_set():
                raise
            fatal = interrupt
            client.stop.set()
            if stopping:
                stopping()
            continue
        if item is None:
            active -= 1
            continue
        place, result = item
        if isinstance(result, Example):
            done[place], barren = result, 0
        elif isinstance(result, Failure):
            failed[examples[place].id], barren = result.what, barren + 1
            if barren >= max(5, 2 * workers) and fatal is None:
                fatal = InputError(
                    "the endpoint",
                    "",
                    f"has not answered {barren} requests in a row: {result.what}",
                    "check it, and run the same command again; what was answered is kept",
                )
        else:
            fatal = fatal or result
        if fatal:
            client.stop.set()
    if fatal:
        raise fatal
    return Outcome([done[place] for place in sorted(done)], failed)


def estimate(examples: Sequence[Example], endpoint: Endpoint, root: str | Path | None = None) -> dict[str, float]:
    """Return requests, tokens and cost of a run without corrections.

    They are estimated from the lengths of the requests and of the targets that the template writer would write.
    """
    asked = [example for example in examples if asked_about(example)]
    requests = [prompts.messages(example, root) for example in asked]
    total_in = sum(map(tokens_in, requests))
    total_out = sum(len(request[-1]["content"]) // CHARACTERS_PER_TOKEN for request in requests)
    return {
        "requests": len(asked),
        "tokens_in": total_in,
        "tokens_out": total_out,
        "cost": endpoint.cost(total_in, total_out),
    }
