"""Cases, one after another: what is changed, what reads it, and whether that is how bad input should be met."""

from __future__ import annotations

import functools
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.programs.fuzz import command_lines, extremes, inputs, mutate
from tests.programs.fuzz.cage import Cage, Outcome
from tests.programs.fuzz.inputs import Command, Kind
from tests.programs.hostile_files import Tally

LINES, OVERRIDES, EXTREMES = "command lines", "config overrides", "extremes"
_SEED = st.integers(0, 2**32 - 1)


class Plan(NamedTuple):
    """One case: which file and which command of a kind, and the changes, as (which of the family, seed)."""

    file: int
    command: int
    changes: tuple[tuple[int, int], ...]


PLANS = st.builds(
    Plan, _SEED, st.integers(0, 59), st.lists(st.tuples(st.integers(0, 59), _SEED), min_size=1, max_size=3).map(tuple)
)


def plans(count: int, number: int) -> list[Plan]:
    """So many plans, the same ones for the same `number`."""
    found: list[Plan] = []

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(PLANS)
    def take(plan: Plan) -> None:
        # hypothesis likes some numbers: the same change is not to be made twice
        changes = tuple((which, drawn ^ 2654435761 * len(found) % 2**32) for which, drawn in plan.changes)
        found.append(plan._replace(changes=changes))

    take()
    return found


class Campaign:
    """Runs cases in a world that it builds in a folder, unless one is there. keep: where failing inputs go."""

    def __init__(self, folder: Path, keep: Path | None = None, model: bool = True):
        self.folder, self.keep, self.tally = folder, keep, Tally()
        self.cage = Cage(folder / "cage")
        self.world = folder / "world"
        if not (folder / "built").exists():
            shutil.rmtree(self.world, ignore_errors=True)
            inputs.build(self.world, self.cage, model)
            (folder / "built").touch()
        self.number = 0

    def close(self) -> None:
        self.cage.close()

    # Files.

    def case(self, kind: Kind, plan: Plan) -> str:
        """What fell when a changed file of a kind was read, "" for nothing; it is counted."""
        case = self._fresh()
        inputs.link(self.world / kind.take, case / "in")
        files = sorted(path for path in (case / "in").glob(kind.file) if path.is_file() and path.stat().st_size)
        file = files[plan.file % len(files)]
        whole = file.read_bytes()
        changed, how = mutate.apply(whole, kind.family, plan.changes[:1] if kind.same else plan.changes)
        if changed == whole:
            return ""
        file.unlink()
        file.write_bytes(changed)
        command = self._filled(kind.commands[plan.command % len(kind.commands)], case, file)
        outcome, said = self._run(command, case)
        if not said and kind.same and outcome.code == 0:
            relative = str(file.relative_to(case / "in"))
            said = "" if outcome.out == self._digest(kind, relative) else "is read, but not as it was"
        self._count(kind.name, f"{file.name}: {how}", command, said, outcome)
        return said

    @functools.lru_cache  # noqa: B019  (a campaign lives as long as its process)
    def _digest(self, kind: Kind, file: str) -> str:
        """The hash of the sound file, or of the sound folder."""
        assert kind.same
        path = self.world / kind.take / (file if kind.same[1] == "{file}" else "")
        done = self.cage.run("tests.programs.fuzz.digest", [kind.commands[0].arguments[0], str(path)])
        assert done.code == 0, done.err
        return done.out

    def extreme(self, kind: Kind, name: str, make: Callable[[Path], None], number: int) -> str:
        """What fell when something stood in the place of a file of a kind."""
        case = self._fresh()
        inputs.link(self.world / kind.take, case / "in")
        file = case / "in" / kind.file
        whole = file.read_bytes()
        file.unlink()
        if make is extremes.zeros_behind:
            file.write_bytes(whole)
        make(file)
        command = self._filled(kind.commands[number % len(kind.commands)], case, file)
        outcome, said = self._run(command, case)
        self._count(EXTREMES, f"{name} for {file.name}", command, said, outcome)
        if file.is_file() and not file.is_symlink():
            file.unlink()  # of gigabytes, perhaps
        return said

    # Command lines.

    def line(self, name: str, plan: Plan) -> str:
        """What fell when a command line was read."""
        case, chance = self._fresh(), random.Random(plan.changes[0][1])
        if name == OVERRIDES:
            command = command_lines.override_line(chance)
        else:
            verb = sorted(command_lines.COMMANDS)[plan.file % len(command_lines.COMMANDS)]
            command = command_lines.command_line(verb, self._options(verb), chance)
        (case / "in").mkdir()
        command = self._filled(command, case, case / "in")
        outcome, said = self._run(command, case)
        self._count(name, command.module, command, said, outcome)
        return said

    @functools.lru_cache  # noqa: B019
    def _options(self, verb: str) -> list[str]:
        return command_lines.options_of(verb, self.cage)

    # Of both.

    def _fresh(self) -> Path:
        self.number += 1
        shutil.rmtree(self.folder / "cases", ignore_errors=True)
        case = self.folder / "cases" / str(self.number)
        (case / "out").mkdir(parents=True)
        return case

    def _filled(self, command: Command, case: Path, file: Path) -> Command:
        places = {"{in}": str(case / "in"), "{out}": str(case / "out"), "{world}": str(self.world), "{file}": str(file)}
        return command._replace(
            arguments=tuple(
                functools.reduce(lambda text, place: text.replace(*place), places.items(), part)
                for part in command.arguments
            )
        )

    def _run(self, command: Command, case: Path) -> tuple[Outcome, str]:
        before = _state(case / "in")
        outcome = self.cage.run(command.module, command.arguments)
        said = outcome.fell(command.codes) or inputs.pages(case / "out")
        if not said and (other := before ^ _state(case / "in")):
            said = f"its input was changed: {min(other)[0]}"
        return outcome, said

    def _count(self, kind: str, what: str, command: Command, said: str, outcome: Outcome) -> None:
        self.tally.add(kind, f"{command.module} {' '.join(command.arguments[:2])}: {what:.200}", said)
        if said and self.keep:
            kept = Path(tempfile.mkdtemp(prefix=f"{kind.replace('/', '_').replace(' ', '_')}.", dir=self.keep))
            shutil.copytree(self.folder / "cases" / str(self.number), kept / "case", symlinks=True)
            line = " ".join(map(repr, ("python", "-m", command.module, *command.arguments)))
            (kept / "why.txt").write_text(
                f"{said}\n{what}\n{line}\n\n{outcome.err[-5000:]}", "utf-8", "backslashreplace"
            )


def _state(folder: Path) -> set[tuple[str, int, int]]:
    """What a folder holds: (path, size, time of change) of each file."""
    return {
        (str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir()
    }


def cases(
    campaign: Campaign, each: int, number: int, only: Sequence[str] = (), slow: bool = True
) -> Iterator[tuple[str, Callable[[], str]]]:
    """(kind, a function that runs one case) of `each` cases of every kind of file, and as many more of command lines.
    only: words of which the names of kinds must hold one. slow: with commands that need a model."""
    todo: list[tuple[str, Callable[[], str]]] = []

    def wanted(name: str) -> bool:
        return not only or any(word in name for word in only)

    for place, kind in enumerate([*inputs.kinds_of(campaign.world), *inputs.exact_kinds()]):
        if not slow:
            kind = kind._replace(
                commands=tuple(
                    one
                    for one in kind.commands
                    if one.module.startswith(("data_pipelines", "tests", "crab_jax.compare", "crab_jax.convert"))
                )
            )
        if kind.commands and wanted(kind.name):
            todo += [
                (kind.name, functools.partial(campaign.case, kind, plan)) for plan in plans(each, 1000 * number + place)
            ]
    for place, (kind, name, make) in enumerate(extremes.extremes(inputs.kinds_of(campaign.world))):
        every = range(len(kind.commands))
        for at in every if kind.name in inputs.MEDIA else [place % len(every)]:
            if wanted(EXTREMES) and (slow or not kind.commands[at].module.startswith("crab_jax")):
                todo.append((EXTREMES, functools.partial(campaign.extreme, kind, name, make, at)))
    for place, name in enumerate((LINES, OVERRIDES)):
        if wanted(name):
            todo += [
                (name, functools.partial(campaign.line, name, plan))
                for plan in plans(8 * each, 1000 * number + 998 + place)
            ]
    random.Random(number).shuffle(todo)
    return iter(todo)
