"""Mutation testing: `python -m tests.mutants ROOM [MODULE ...]`, or `make mutants ROOM=losses`.

Every mutant (changes.py) of the modules of a room (rooms.py) is run against the tests of that room, in a copy of the
tree. It is killed where a test fails, and survives where none does. Verdicts are kept in runs/mutants/journal.jsonl, so
that the same command goes on where it was stopped. Exit code 1: less than 90 % are killed; 3: --minutes ended it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.changes import Mutant, mutants
from tests.mutants.journal import Journal, digest, equivalents, identity
from tests.mutants.rooms import ROOMS
from tests.mutants.trial import Trial, Verdict, copy_tree, warm

CHECKOUT = Path(__file__).resolve().parents[2]
WANTED = 0.9  # of the mutants that are not equivalent


def main() -> int:
    """Run the command line."""
    options = _options()
    folder = CHECKOUT / "runs" / "mutants"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")
    journal, state = Journal(folder / "journal.jsonl", CHECKOUT), 0
    ends = time.monotonic() + 60 * options.minutes
    chosen = {module: tests for room in options.rooms for module, tests in ROOMS[room].items()}
    modules = {module: tests for module, tests in chosen.items() if not options.only or module in options.only}
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        trees: list[Path] = []
        for module, tests in modules.items():
            work = _Module(module, tests, options, journal)
            if work.open and not trees:
                warm()
                trees = [copy_tree(CHECKOUT, Path(scratch) / str(index)) for index in range(options.jobs)]
            try:
                finished = work.run(trees, ends)
            except KeyboardInterrupt:
                finished = False
            state = max(state, work.summary())
            if not finished:
                print("stopped; the same command goes on from here")
                return 3
    return state


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("rooms", nargs="+", choices=sorted(ROOMS), metavar="ROOM", help=", ".join(sorted(ROOMS)))
    parser.add_argument("--only", action="append", default=[], metavar="FILE", help="only these modules of the rooms")
    parser.add_argument("--sample", type=int, default=0, help="so many mutants of each module, drawn by --seed (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many minutes")
    parser.add_argument("--list", action="store_true", help="show the mutants and try none")
    return parser.parse_args()


class _Module:
    """The mutants of one module that are to be tried, and what became of them."""

    def __init__(self, module: str, tests: tuple[str, ...], options: argparse.Namespace, journal: Journal) -> None:
        self.module, self.tests, self.journal, self.options = module, tests, journal, options
        self.source = (CHECKOUT / module).read_text()
        made = mutants(self.source)
        if options.sample and options.sample < len(made):
            made = sorted(random.Random(options.seed).sample(made, options.sample))
        known = equivalents()
        self.equivalent = [mutant for mutant in made if identity(module, mutant) in known]
        self.mutants = [mutant for mutant in made if identity(module, mutant) not in known]
        files = [file for test in tests for file in sorted((CHECKOUT / test).rglob("*.py")) or [CHECKOUT / test]]
        self.digest = digest(*(file.read_text() for file in files))
        keys = {mutant: journal.key(self.source, mutant) for mutant in self.mutants}
        self.keys = keys
        self.by = {m: by for m in self.mutants if (by := journal.killer(keys[m], self.digest)) is not None}
        self.open = [] if options.list else [mutant for mutant in self.mutants if mutant not in self.by]

    def run(self, trees: list[Path], ends: float) -> bool:
        """Try the mutants that are open, one in each tree at a time; return whether all were tried."""
        if self.options.list:
            for mutant in self.mutants:
                print(_shown(self.module, mutant))
            return True
        if not self.open:
            return True
        unchanged = _wait([Trial(trees[0], self.tests, 1800.0, {}).start()])[1]
        for tree in trees[1:]:  # the compiled tests
            shutil.copytree(trees[0] / "tests", tree / "tests", dirs_exist_ok=True)
        if unchanged.killed:
            output = (trees[0] / "mutants-output.txt").read_text()[-3000:]
            sys.exit(f"{output}\nerror: {unchanged.by} fails without any change: the tests of {self.module} must pass")
        limit = 10 + 2 * unchanged.seconds
        print(
            f"{self.module}: {len(self.open)} mutants to try; all tests take {unchanged.seconds:.0f} s of CPU",
            flush=True,
        )
        waiting, running, begun, done = list(self.open), {}, time.monotonic(), 0
        free = list(trees)
        while running or (waiting and time.monotonic() < ends):
            while waiting and free and time.monotonic() < ends:
                mutant, tree = waiting.pop(0), free.pop()
                changed = (self.module, mutant.apply(self.source))
                trial = Trial(tree, self.tests, limit, unchanged.durations, changed).start()
                running[trial.process] = (trial, mutant)
            trial, verdict = _wait([trial for trial, _ in running.values()])
            _, mutant = running.pop(trial.process)
            free.append(trial.tree)
            done += 1
            self.by[mutant] = verdict.by
            self.journal.add(self.keys[mutant], verdict.by, self.digest, self.module, mutant)
            rate = (time.monotonic() - begun) / done
            left = f"{rate:.1f} s each, {rate * (len(self.open) - done) / 60:.0f} min left"
            if not verdict.killed:
                print(f"survived {_shown(self.module, mutant)}", flush=True)
            if done % 10 == 0 or not verdict.killed:
                print(f"  {done} of {len(self.open)}, {left}", flush=True)
        return not waiting

    def summary(self) -> int:
        """Print what became of the mutants; return 1 where too few were killed."""
        if not self.by and not self.equivalent:
            return 0
        survived = [mutant for mutant, by in self.by.items() if not by]
        killed = len(self.by) - len(survived)
        share = killed / max(1, len(self.by))
        slow = sum(by == "timeout" for by in self.by.values())
        print(
            f"{self.module}: {killed} of {len(self.by)} killed ({share:.0%}; {slow} by the time limit), "
            f"{len(self.equivalent)} equivalent, {len(self.mutants) - len(self.by)} not tried"
        )
        for mutant in survived:
            print(f"  survived {_shown(self.module, mutant)}")
        return int(bool(self.by) and share < WANTED)


def _wait(trials: list[Trial]) -> tuple[Trial, Verdict]:
    """Return the first of the trials that ends, with its verdict."""
    while True:
        for trial in trials:
            if verdict := trial.poll():
                return trial, verdict
        time.sleep(0.02)


def _shown(module: str, mutant: Mutant) -> str:
    return f"{module}:{mutant.line} {mutant.function}\n    - {mutant.before}\n    + {mutant.after}"


if __name__ == "__main__":
    sys.exit(main())
