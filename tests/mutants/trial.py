"""One mutant against the tests of its room, in a copy of the tree and in a fork of a process that has the libraries.

Why not mutmut or cosmic-ray: mutmut 3.8 forks after tests have run JAX, whose threads a fork lacks, so mutants hang
and count as killed; and it changes neither decorated functions (`nn.compact`, `jax.jit`, `property`) nor constants of a
module. cosmic-ray 8.7 changes files in place and starts a process per mutant, which imports JAX for seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# What takes long to import, and knows nothing of this project. No thread may be left by it: a fork has only the one.
LIBRARIES = ("jax", "jax.numpy", "flax.linen", "optax", "orbax.checkpoint", "grain.python", "scipy.optimize", "pytest")
LIBRARIES += ("hypothesis", "tokenizers", "transformers", "safetensors.numpy", "PIL.Image", "av", "soundfile", "soxr")
LIBRARIES += ("pycocotools.mask", "ml_collections", "tensorboardX", "einops", "absl.testing.parameterized")
WAITING = 10  # seconds on the clock for each of the processor, after which a program is taken to hang
OURS = ("crab_jax", "data_pipelines", "configs", "tests")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the tests said: `killed` by the test `by` (or by "import", "crash", "timeout"), or survived ("")."""

    by: str
    seconds: float  # of the processor
    durations: dict[str, float]

    @property
    def killed(self) -> bool:
        return bool(self.by)


def warm() -> None:
    """Import the libraries in this process, with the settings that the tests ask for."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def copy_tree(checkout: Path, folder: Path) -> Path:
    """Copy what git knows of the checkout, or would, and return the copy."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=checkout,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, target = checkout / name, folder / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    subprocess.run([sys.executable, "-m", "compileall", "-q", *OURS], cwd=folder, check=False, capture_output=True)
    return folder


@dataclasses.dataclass
class Trial:
    """A fork that runs tests in a tree; `poll` gives its Verdict once it has ended."""

    tree: Path
    tests: tuple[str, ...]
    limit: float  # seconds of the processor: others may use it too
    durations: dict[str, float]  # of each test, when all pass: the quick ones are run first
    changed: tuple[str, str] | None = None  # a file of the tree, and what it holds meanwhile

    def start(self) -> Trial:
        """Put the changed file into the tree and fork."""
        self.original = None
        if self.changed:
            file = self.tree / self.changed[0]
            self.original = file.read_text()
            file.write_text(self.changed[1])
            for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
                compiled.unlink()
        self.report = self.tree / "mutants-report.json"
        self.report.unlink(missing_ok=True)
        self.begun = time.monotonic()
        sys.stdout.flush()
        self.process = os.fork()
        if not self.process:
            status = 70
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (int(self.limit), int(self.limit) + 5))
                status = _run_tests(self.tree, self.tests, self.report, self.durations, keep=not self.changed)
            finally:
                os._exit(status)
        return self

    def poll(self) -> Verdict | None:
        """Return the verdict, or None while the tests run."""
        ended, status, used = os.wait4(self.process, os.WNOHANG)
        if not ended and time.monotonic() - self.begun < WAITING * self.limit:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)  # also what the tests have started
        if not ended:
            _, status, used = os.wait4(self.process, 0)
        seconds = used.ru_utime + used.ru_stime
        if self.changed:
            (self.tree / self.changed[0]).write_text(self.original or "")
        durations: dict[str, float] = {}
        failed = ""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.report.read_text())
            failed, durations = found["failed"], found["durations"]
        code = os.waitstatus_to_exitcode(status)
        if not ended or code == -signal.SIGXCPU:
            return Verdict("timeout", seconds, durations)
        if code == 0:
            return Verdict("", seconds, durations)
        return Verdict(failed or ("crash" if code < 0 else "import"), seconds, durations)


class _Report:
    """A pytest plugin: quick tests first, slow ones of all files last, and what failed."""

    def __init__(self, tests: tuple[str, ...], file: Path, durations: dict[str, float]) -> None:
        self.tests, self.file, self.known = tests, file, durations
        self.durations: dict[str, float] = {}
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list) -> None:  # type: ignore[type-arg]
        order = {test: place for place, test in enumerate(self.tests)}
        long = sum(self.known.values()) / 10

        def key(item) -> tuple[bool, int, float]:  # type: ignore[no-untyped-def]
            file, seconds = item.nodeid.split("::")[0], self.known.get(item.nodeid, 0.0)
            place = min((order[test] for test in order if f"{file}/".startswith(f"{test}/")), default=0)
            return seconds > long, place, seconds

        items.sort(key=key)

    def pytest_runtest_logreport(self, report) -> None:  # type: ignore[no-untyped-def]
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + report.duration
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps({"failed": self.failed, "durations": self.durations}))


def _run_tests(tree: Path, tests: tuple[str, ...], report: Path, durations: dict[str, float], keep: bool) -> int:
    """Run the tests in this process, which is a fork, and return pytest's exit status."""
    import pytest

    os.setpgrp()  # in the session of the tool, whose priority the tests keep
    os.chdir(tree)
    output = os.open("mutants-output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ["PYTHONPATH"] = str(tree)
    if not keep:  # the file changes several times in a second, and compiled files are told apart by the second
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(folder for folder in sys.path if not (Path(folder or ".") / "crab_jax").is_dir())]
    importlib.invalidate_caches()
    arguments = ["-x", "-n0", "-p", "no:cacheprovider", "-p", "no:randomly", "--durations=0", f"--rootdir={tree}"]
    arguments += ["-m", "not slow and not exhaustive"]  # a room has quick tests of what it says
    status = int(pytest.main([*arguments, *tests], plugins=[_Report(tests, report, durations)]))
    package = sys.modules.get("crab_jax")
    if package is not None and not str(package.__file__).startswith(str(tree)):
        raise RuntimeError(f"the tests ran on {package.__file__}, not on the copy in {tree}")
    sys.stdout.flush()
    return status
