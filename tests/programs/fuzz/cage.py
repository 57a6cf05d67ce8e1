"""A process that runs one command after another, and what became of each.

Commands run as `python -m MODULE ARGUMENTS` would, but in a process that has imported and compiled already, so that one
takes a part of a second. What ends that process ends no other: the next command gets a new one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).parents[3]
SECONDS, GIGABYTES = 60, 4  # that a command may take
_MOST_DATA = 12 << 30  # bytes that the process may ask for: what runs away ends there, and not with the machine
_COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_SHOWN = 200_000  # characters that are kept of what a command says


class Outcome(NamedTuple):
    """code: the exit code, None where the process ended otherwise; how it ended then; what it said; seconds;
    gigabytes: the most memory that it held."""

    code: int | None
    how: str
    out: str
    err: str
    seconds: float
    gigabytes: float

    def fell(self, codes: Sequence[int]) -> str:
        """What of it no command may do, given the exit codes that this one may have; "" for nothing."""
        if self.code is None:
            return self.how
        if "Traceback (most recent call last)" in self.err + self.out:
            return f"traceback: {_last_line(self.err)}"
        if self.code not in codes:
            return f"exit code {self.code}: {_last_line(self.err)}"
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if len(errors) != (self.code == 2) or (errors and not re.fullmatch(r"error: .+: .+; .+", errors[0])):
            return f"exit code {self.code} with {len(errors)} lines of an error: {_last_line(self.err)}"
        if self.seconds > SECONDS:
            return f"took {self.seconds:.0f} s"
        return f"held {self.gigabytes:.1f} GB" if self.gigabytes > GIGABYTES else ""


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


class Cage:
    """Runs commands in a process of its own. `folder`: where it keeps what they say; `path`: where else modules are."""

    def __init__(self, folder: Path, path: Path = REPO):
        self.folder, self._path = folder, os.pathsep.join((str(REPO), str(path)))
        folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[str] | None = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            environment = {
                "XLA_FLAGS": _COMPILE_FAST,
                **os.environ,
                "PYTHONPATH": self._path,
                "JAX_PLATFORMS": "cpu",
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "PYTHONHASHSEED": "0",
                "HF_HUB_OFFLINE": "1",
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.programs.fuzz.cage", str(self.folder)],
                cwd=REPO,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._process

    def run(self, module: str, arguments: Sequence[str], seconds: float = 2 * SECONDS) -> Outcome:
        """`python -m module arguments`, killed after so many seconds."""
        process, start = self._started(), time.monotonic()
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps([module, *arguments]) + "\n")
        process.stdin.flush()
        answered = select.select([process.stdout], [], [], seconds)[0]
        line = process.stdout.readline() if answered else ""
        took = time.monotonic() - start
        said = [(self.folder / name).read_bytes()[:_SHOWN].decode("utf-8", "replace") for name in ("out", "err")]
        if line:
            code, memory = json.loads(line)
            if memory > GIGABYTES:
                self.close()  # what it holds may be what a library keeps
            return Outcome(code, "", *said, took, memory)
        self.close()
        ended = process.returncode or 0
        name = signal.Signals(-ended).name if ended < 0 else f"exit code {ended}"
        return Outcome(
            None, f"ended its process: {name}" if answered else f"still ran after {seconds:.0f} s", *said, took, 0.0
        )

    def close(self) -> None:
        """End the process, and those that it has started."""
        if self._process is not None:
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


# In the process.


def _serve(folder: Path) -> None:
    """Run the commands that come through standard input, a JSON list a line; answer [code, gigabytes]."""
    answers = os.fdopen(os.dup(1), "w")
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (_MOST_DATA, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    # Once, for loggers keep them: what lies behind 1 and 2 is another file for every command.
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w"), "utf-8", line_buffering=True, write_through=True) for number in (1, 2)
    )
    for line in sys.stdin:
        module, *arguments = json.loads(line)
        _forget_peak()
        code = _command(module, arguments, folder)
        answers.write(json.dumps([code, _peak()]) + "\n")
        answers.flush()


def _command(module: str, arguments: list[str], folder: Path) -> int:
    """The exit code of a command, whose output goes to files of the folder."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    before = os.getcwd()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exception(error)
        code = 1
    finally:
        os.chdir(before)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    return code


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Gigabytes that this process held at most since `_forget_peak`, or a process that it started did."""
    text = Path("/proc/self/status").read_text() if os.path.exists("/proc/self/status") else ""
    found = re.search(r"VmHWM:\s+(\d+)", text)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(int(found[1]) if found else 0, children) / 2**20


if __name__ == "__main__":
    _serve(Path(tempfile.gettempdir() if len(sys.argv) < 2 else sys.argv[1]))
