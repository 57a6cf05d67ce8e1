"""Every task that this process knows: the nine benchmark tasks, and those that a user brings.

`TASKS` holds the nine in a fixed order, which `Batch.task` indexes; a user's tasks come after them in the order in
which they are given. They join it once, at the edge of a program, by `use_tasks`: `train` takes them from the config
key `tasks`, the other commands from `--task-modules`, the library from `ask(task=...)` and `load(tasks=...)`. Below the
edge everything reads `TASKS` by the names that Examples carry, so that no function has to pass on tasks that it does
not look at; processes that decode get the names that they need in their DataConfig. There is no other way in: nothing
that is read from disk (a checkpoint's config.json, a list of Examples) ever imports a module.
"""

from __future__ import annotations

import importlib
from argparse import ArgumentParser
from collections.abc import Iterable

from crab_jax.io.bounds import Modules
from crab_jax.io.errors import InputError
from crab_jax.tasks.arig import ARIG
from crab_jax.tasks.avcap import AVCAP
from crab_jax.tasks.ave import AVE
from crab_jax.tasks.avqa import AVQA
from crab_jax.tasks.avs import AVSS, MS3, S4
from crab_jax.tasks.avvp import AVVP
from crab_jax.tasks.ref_avs import REF_AVS
from crab_jax.tasks.task import Task

BENCHMARKS = (AVQA, AVE, AVVP, ARIG, S4, MS3, AVSS, REF_AVS, AVCAP)
TASKS: dict[str, Task] = {task.name: task for task in BENCHMARKS}
TASK_NAMES = tuple(TASKS)  # of the nine
FLAG = "--task-modules"


def use_tasks(tasks: Iterable[Task | str], where: str = FLAG) -> None:
    """Let this process know the tasks of a user: Tasks, or the modules that hold them as `from_modules` reads them.

    A task that is known already changes nothing, and one that its own module defines anew takes the place of the former
    (a cell of a notebook that is run again). Raises InputError for a name that another task has, and as `from_modules`.
    """
    for given in tasks:
        for task in from_modules(given, where) if isinstance(given, str) else [given]:
            if not isinstance(task, Task):
                raise InputError(where, "", f"is {task!r:.60}, which is no Task", "give crab_jax.Task(...)")
            known = TASKS.get(task.name)
            if known is not None and known is not task and (known in BENCHMARKS or _home(known) != _home(task)):
                whose = "a task of crab_jax" if known in BENCHMARKS else f"another task, of {_home(known)[0]}"
                raise InputError(where, task.name, f"is the name of {whose}", "give your task another name")
            TASKS[task.name] = task


def _home(task: Task) -> tuple[str, str]:
    """The module and the name of what a task counts, by which it is known again."""
    return task.stats.__module__, getattr(task.stats, "__qualname__", "")


def from_modules(text: str, where: str = FLAG) -> list[Task]:
    """Return the tasks of "package.module:NAME,package.other": the one of a name, or every Task of a module, imported.

    Raises InputError for a module that cannot be imported, and for a name that is not there or no Task.
    """
    found: list[Task] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        module, _, name = part.partition(":")
        try:
            held = vars(importlib.import_module(module))
        except Exception as error:  # a user's module may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            fix = "give a module as Python imports it, from the current folder or PYTHONPATH"
            raise InputError(where, part, f"cannot be imported ({reason:.200})", fix) from error
        ours = [value for value in held.values() if isinstance(value, Task) and value not in BENCHMARKS]
        if name:
            ours = [held[name]] if isinstance(held.get(name), Task) else []
        if not ours:
            problem = f"the module holds no Task named {name}" if name else "the module holds no Task"
            raise InputError(where, part, problem, "give package.module:NAME, where NAME = crab_jax.Task(...)")
        found += ours
    return found


def add_flag(parser: ArgumentParser) -> None:
    """Give a command the option --task-modules, whose text `use_tasks` takes."""
    parser.add_argument(
        FLAG,
        type=Modules(),
        default="",
        metavar="A.B:NAME,C.D",
        help="modules with tasks of your own, which are imported (docs/your_data.md)",
    )
