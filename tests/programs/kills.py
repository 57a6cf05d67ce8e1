"""Kill verbs and fill their disks at seeded moments, and run them again: the results must be those of a run that
nothing disturbed.

    python -m tests.programs.kills [--kills 20 --full 20 --seed 0 --only train,prepare --work DIR]

Half of the moments are a number of files that a verb has made so far (the moments of writing), half are any time. A
kill is SIGKILL, to the verb and what it started or to the verb alone; a run is killed up to five times before it may
end. A full disk is a small one (tmpfs; without the right to mount, in a namespace of its own) that another file fills
up. A verb whose disk is full must say so in one line and exit with 2, or not need it any more. docs/reliability.md has
the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TESTS = Path(__file__).parents[1]
WEIGHTS = TESTS / "golden" / "weights"
SMALL = (
    "--config.sizes.llama.layers=1",
    "--config.sizes.clip.layers=2",
    "--config.sizes.clip.taps=(1,2,2)",
    "--config.sizes.beats.layers=1",
    "--config.sizes.visual.layers=1",
    "--config.sizes.audio.layers=1",
    *(f"--config.data.weights.{task}=0" for task in ("avqa", "avvp", "arig", "s4", "ms3", "avss", "ref-avs", "avcap")),
)
DISK = 96 << 20  # bytes of the small disk
PACK = (
    "from pathlib import Path; import sys; from crab_jax.tiny_world import recipe; "
    "from crab_jax.io.errors import run_verb; "
    "run_verb(lambda: recipe.pack(Path(sys.argv[1]), Path(sys.argv[2])))"
)


class Verb(NamedTuple):
    """What to disturb. words: what follows `python` for a base folder and an --out. result: what `out` holds that must
    be the same."""

    words: Callable[[Path, Path], list[str]]
    result: Callable[[Path], Any]


class Outcome(NamedTuple):
    """How a verb ended: its exit code, what it said on stderr, how many names it made, its seconds."""

    code: int
    said: str
    names: int
    seconds: float


# What a folder holds.


def files_of(out: Path) -> dict[str, str]:
    """Digests of all files below `out` but hidden ones, by name."""
    paths = [out] if out.is_file() else sorted(out.rglob("*"))
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(out).parts)
    }


def trained(out: Path) -> Any:
    """The records of a run, without speeds, and what the arrays of its checkpoints hold."""
    from crab_jax.checkpoints import digests, orbax, run_steps, stored

    run = run_steps.RunCheckpoints(out / "checkpoints")
    step = run.latest
    assert step is not None
    state = run._restore(step, orbax.tree_metadata(run.folder / str(step), "train"))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in record.items() if not (k.endswith(("_per_s", "wait_share")) or k.startswith("goodput"))}
        for record in records
    ]
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    return kept, names, digests.tree_hash(state), digests.tree_hash(stored.load_params(out))


def imported(out: Path) -> Any:
    """The parameters of an imported model, and its other files."""
    from crab_jax.checkpoints import digests, stored

    others = {name: digest for name, digest in files_of(out).items() if not name.startswith("params/")}
    return digests.tree_hash(stored.load_params(out)), others


def _module(name: str, *words: object) -> list[str]:
    return ["-m", name, *map(str, words)]


def _import(base: Path, out: Path) -> list[str]:
    config = json.loads((TESTS / "golden" / "manifest.json").read_text())["config"]
    return _module(
        "crab_jax.convert",
        "import",
        "--clip",
        WEIGHTS / "clip",
        "--llama",
        WEIGHTS / "llama",
        "--beats",
        WEIGHTS / "beats" / "BEATs_tiny.pt",
        "--crab",
        WEIGHTS / "crab" / "finetune_weights.bin",
        WEIGHTS / "crab" / "avs_finetune_weights.bin",
        "--bert",
        WEIGHTS / "bert" / "config.json",
        "--taps",
        ",".join(map(str, config["select_layer_list"])),
        "--lora-alpha",
        config["lora"]["lora_alpha"],
        "--low-res",
        config["seg"]["low_res_mask_size"],
        "--dtype",
        "float32",
        "--out",
        out,
    )


_MODEL = ("--checkpoint", TESTS.parent / "crab_jax/warm_start")
VERBS = {
    "train": Verb(
        lambda base, out: _module(
            "crab_jax.train",
            f"--config={TESTS.parent}/configs/tiny.py",
            "--config.init_from=",
            f"--config.data.root={base}/scenes",
            "--config.data.batch_size=4",
            "--config.data.lengths=(272,)",
            *SMALL,
            "--config.steps=6",
            "--config.log_every=1",
            "--config.checkpoint_every=2",
            f"--workdir={out}",
        ),
        trained,
    ),
    "prepare": Verb(
        lambda base, out: _module(
            "data_pipelines",
            "prepare",
            "--root",
            base / "scenes",
            "--out",
            out,
            "--image-size",
            64,
            "--shard-mb",
            1,
            "--workers",
            2,
        ),
        files_of,
    ),
    "evaluate": Verb(
        lambda base, out: _module(
            "crab_jax.evaluate",
            *_MODEL,
            "--data",
            base / "scenes",
            "--tasks",
            "s4,ave",
            "--batch-size",
            1,
            "--max-new-tokens",
            96,
            "--out",
            out,
        ),
        files_of,
    ),
    "import": Verb(_import, imported),
    "av_uie annotate": Verb(
        lambda base, out: _module(
            "data_pipelines.av_uie",
            "annotate",
            "--examples",
            base / "scenes" / "train.jsonl",
            "--url",
            (base / "url").read_text(),
            "--model",
            "m",
            "--workers",
            2,
            "--corrections",
            0,
            "--out",
            out / "llm.jsonl",
        ),
        lambda out: files_of(out / "llm.jsonl"),
    ),
    "av_uie write": Verb(
        lambda base, out: _module(
            "data_pipelines.av_uie",
            "write",
            "--examples",
            base / "scenes" / "train.jsonl",
            "--out",
            out / "written.jsonl",
        ),
        files_of,
    ),
    "av_uie verify": Verb(
        lambda base, out: _module(
            "data_pipelines.av_uie", "verify", "--examples", base / "scenes" / "train.jsonl", "--out", out
        ),
        files_of,
    ),
    "predict": Verb(
        lambda base, out: _module(
            "crab_jax.predict",
            *_MODEL,
            "--task",
            "s4",
            "--video",
            base / "scenes/test/000000/clip.mp4",
            "--second",
            4,
            "--max-new-tokens",
            96,
            "--out",
            out,
        ),
        files_of,
    ),
    "export": Verb(
        lambda base, out: _module("crab_jax.convert", "export", base / "imported", "--format", "hf", "--out", out),
        files_of,
    ),
    "pack": Verb(lambda base, out: ["-c", PACK, str(base / "trained"), str(out)], files_of),
    "own": Verb(
        lambda base, out: _module(
            "data_pipelines", "own", "--csv", base / "table.csv", "--root", out, "--copy", "--overwrite", "--workers", 1
        ),
        files_of,
    ),
    "report": Verb(
        lambda base, out: _module(
            "crab_jax.report",
            "--run",
            TESTS.parent / "crab_jax/warm_start",
            "--results",
            TESTS.parent / "crab_jax/warm_start/results.json",
            "--data",
            base / "scenes",
            "--samples",
            1,
            "--routing-samples",
            1,
            "--max-new-tokens",
            16,
            "--out",
            out / "report.html",
        ),
        files_of,
    ),
    "compare": Verb(
        lambda base, out: _module(
            "crab_jax.compare", base / "evaluated", base / "evaluated", "--out", out / "differences.json"
        ),
        files_of,
    ),
    "sample": Verb(
        lambda base, out: _module("data_pipelines", "sample", "--root", base / "scenes", "--n", 1, "--out", out),
        files_of,
    ),
    "inspect": Verb(
        lambda base, out: _module(
            "crab_jax.inspect", "router", *_MODEL, "--data", base / "scenes", "--samples", 1, "--out", out
        ),
        files_of,
    ),
    "scenes": Verb(
        lambda base, out: _module(
            "data_pipelines.sources.scenes", "--out", out, "--train", 4, "--val", 0, "--test", 1, "--workers", 2
        ),
        files_of,
    ),
    "status": Verb(
        lambda base, out: _module("data_pipelines", "status", "--root", base / "scenes", "--json", out / "status.json"),
        files_of,
    ),
    "warmup": Verb(
        lambda base, out: _module(
            "crab_jax.warmup", "--data", base / "scenes", "--out", out / "warm", "--scale", 0.001
        ),
        lambda out: files_of(out / "warm"),
    ),
}
CHAIN = 5
KILLED = ("prepare", "evaluate", "import", "av_uie annotate")  # beside train
FILLED = ("train", "train", "train", "prepare", "prepare", "evaluate", "import", *tuple(VERBS)[4:])


# Disturbing.


def environment() -> dict[str, str]:
    """One compilation cache for all."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": str(TESTS.parent),
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }


def run(
    words: list[str],
    out: Path,
    act: Callable[[subprocess.Popen[str]], object] = lambda process: None,
    names: int = 0,
    seconds: float = 0.0,
    limit: float = 600.0,
) -> Outcome:
    """Run a verb; `act` once, when it has made so many `names` in `out`, or after so many `seconds`."""
    began, seen, acted = time.monotonic(), set[str](), False
    before = {str(path) for path in out.rglob("*")}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.DEVNULL,
            stderr=said,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                for folder, folders, files in os.walk(out):
                    seen |= {f"{folder}/{name}" for name in (*folders, *files)} - before
                passed = time.monotonic() - began
                if not acted and (0 < names <= len(seen) or 0 < seconds <= passed):
                    acted = True
                    act(process)
                assert passed < limit, f"{words} goes on for {limit} s"
                time.sleep(0.001)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        return Outcome(process.returncode, said.read(), len(seen), time.monotonic() - began)


def kill_all(process: subprocess.Popen[str]) -> None:
    """End a verb and what it started."""
    os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def small_disk(at: Path, size: int = DISK) -> Iterator[Path]:
    """A disk of a few MB at a folder. Raises OSError where nothing may be mounted."""
    at.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], capture_output=True).returncode:
        raise PermissionError(1, "mounting is not permitted", str(at))
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def fill(disk: Path, left: int, process: object = None) -> None:
    """Make a file that leaves so many bytes of a disk."""
    with open(disk / "of_another_user", "wb") as file:
        end = 0
        while (free := (found := os.statvfs(disk)).f_bavail * found.f_frsize - left) > 0:
            with contextlib.suppress(OSError):  # a verb was quicker
                os.posix_fallocate(file.fileno(), end, free)
                end += free


def one_line(outcome: Outcome) -> bool:
    """Whether a verb ended as one with a full disk has to."""
    lines = [line for line in outcome.said.splitlines() if line.startswith("error:")]
    return outcome.code == 2 and len(lines) == 1 and "Traceback" not in outcome.said


class Battery:
    """Undisturbed results of verbs, and moments to disturb them at."""

    def __init__(self, work: Path, seed: int):
        self.work, self.rng = work, np.random.default_rng(seed)
        self.base, self.whole = work / "base", dict[str, tuple[Any, Outcome]]()
        self.failed: list[str] = []

    def undisturbed(self, name: str) -> tuple[Any, Outcome]:
        """(result, outcome) of a verb that nothing disturbs."""
        if name not in self.whole:
            out = self.work / "whole" / name.replace(" ", "_") / "out"
            out.parent.mkdir(parents=True, exist_ok=True)
            done = run(VERBS[name].words(self.base, out), out)
            assert done.code == 0, (name, done.said)
            self.whole[name] = VERBS[name].result(out), done
            for verb, folder in (("train", "trained"), ("import", "imported"), ("evaluate", "evaluated")):
                if name == verb and not (self.base / folder).exists():
                    (self.base / folder).symlink_to(out)
        return self.whole[name]

    def moment(self, whole: Outcome, number: int) -> dict[str, float]:
        """Every other one is a moment of writing."""
        if number % 2:
            return {"names": int(self.rng.integers(1, max(2, 0.9 * whole.names)))}
        return {"seconds": float(self.rng.uniform(0.2, 0.9)) * whole.seconds}

    def again(self, name: str, out: Path, how: str) -> bool:
        """Whether the verb, started again, comes to its result."""
        wanted, _ = self.undisturbed(name)
        done = run(VERBS[name].words(self.base, out), out)
        problem = done.said[-500:] if done.code else ""
        if not problem:
            found = VERBS[name].result(out)
            problem = "" if found == wanted else f"other results: {different(wanted, found)}"
        if problem:
            self.failed.append(f"{name}, {how}: {problem}")
        return not problem

    def kill(self, name: str, first: int, most: int = 1) -> tuple[int, bool]:
        """One run that is killed up to `most` times, until it is done: how often it was, and whether it then comes to
        its result."""
        _, whole = self.undisturbed(name)
        out, times, how = self.work / "killed" / f"{name.replace(' ', '_')}{first}" / "out", 0, []
        out.parent.mkdir(parents=True)
        for number in range(first, first + most):
            at, alone = self.moment(whole, number), number % 3 == 2
            ended = run(VERBS[name].words(self.base, out), out, subprocess.Popen.kill if alone else kill_all, **at)
            how.append(f"{at}{' alone' if alone else ''}: exit {ended.code}")
            if ended.code != -signal.SIGKILL:
                break
            times += 1
        return times, self.again(name, out, f"kills {how}")

    def full(self, name: str, number: int) -> bool:
        """One full disk; whether the verb says so in one line, and then comes to its result."""
        _, whole = self.undisturbed(name)
        with small_disk(self.work / "disk") as disk:
            for _ in range(4):  # until one takes room that the verb needed
                out, at, left = disk / "out", self.moment(whole, number), int(self.rng.choice([0, 0, 4096]))
                ended = run(VERBS[name].words(self.base, out), out, functools.partial(fill, disk, left), **at)
                (disk / "of_another_user").unlink(missing_ok=True)
                if ended.code:
                    break
                shutil.rmtree(out)
                number += 1
            how = f"full disk at {at}, {left} bytes left (exit {ended.code})"
            if ended.code and not one_line(ended):
                self.failed.append(f"{name}, {how}: {ended.said[-1500:]}")
                return False
            print(f"    {ended.said.splitlines()[-1][:200] if ended.code else 'needed no more'}", flush=True)
            return self.again(name, out, how)


def different(wanted: Any, found: Any) -> str:
    """What is not the same, in short."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return ", ".join(sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)))[:300]
    if isinstance(wanted, tuple):
        return "; ".join(different(a, b) for a, b in zip(wanted, found, strict=True) if a != b)
    return f"{found!r:.200} for {wanted!r:.200}"


def make_base(base: Path, url: str) -> None:
    """What the verbs read."""
    from data_pipelines.sources import scenes

    base.mkdir(parents=True, exist_ok=True)
    scenes.write(base / "scenes", {"train": 8, "val": 1, "test": 3}, seed=7)
    (base / "url").write_text(url)
    clips = "".join(f"avqa,scenes/train/{number:06d}/clip.mp4,How many?,two\n" for number in range(4))
    (base / "table.csv").write_text(f"task,media,question,answer\n{clips}")


def try_kills(battery: Battery, kills: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """{verb: (kills, those that the same results came after)}, by runs that are killed up to CHAIN times."""
    found = {}
    for name, wanted in kills.items():
        tried = same = first = 0
        while tried < wanted:
            times, good = battery.kill(name, first, min(CHAIN, wanted - tried))
            first, tried, same = first + CHAIN, tried + times, same + times * good
            print(
                f"{name}: {same} of {tried} kills, then the same" + ("" if good else f"; {battery.failed[-1]}"),
                flush=True,
            )
        found[f"killed: {name}"] = tried, same
    return found


def try_full(battery: Battery, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """{verb: (full disks, those that the same results came after)}."""
    tried, same = Counter[str](), Counter[str]()
    for number, name in enumerate(names):
        battery.undisturbed({"export": "import", "pack": "train", "compare": "evaluate"}.get(name, name))
        tried[name] += 1
        same[name] += (good := battery.full(name, number))
        print(f"{name}, full disk: {'same' if good else battery.failed[-1]}", flush=True)
    return {f"full disk: {name}": (count, same[name]) for name, count in tried.items()}


def main() -> None:
    """Print the table, and what did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of train, and as many of other verbs")
    parser.add_argument("--full", type=int, default=len(FILLED))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="verbs, comma-separated")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    if arguments.full and os.geteuid():  # mounting takes a namespace of one's own
        os.execvp("unshare", ["unshare", "-rm", sys.executable, "-m", "tests.programs.kills", *sys.argv[1:]])
    sys.path.append(str(TESTS / "data_pipelines" / "av_uie"))
    from stub_llm import Stub, serving

    with tempfile.TemporaryDirectory(dir=arguments.work) as work, serving(Stub()) as stub:
        battery = Battery(Path(work), arguments.seed)
        make_base(battery.base, stub.url)
        only = [name for name in arguments.only.split(",") if name] or list(VERBS)
        kills = {"train": arguments.kills} | dict.fromkeys(KILLED, -(-arguments.kills // len(KILLED)))
        counts = try_kills(battery, {name: times for name, times in kills.items() if name in only})
        counts |= try_full(battery, [name for name in FILLED[: arguments.full] if name in only])
    print("| what | tried | same |\n|---|---|---|")
    for what, (tried, same) in counts.items():
        print(f"| {what} | {tried} | {same} |")
    print("\n".join(battery.failed))
    sys.exit(1 if battery.failed else 0)


if __name__ == "__main__":
    main()
