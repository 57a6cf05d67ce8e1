"""The tasks that this process knows: the nine benchmark tasks, and the tasks that a user defines.

`TASKS` holds the nine in a fixed order, which `Batch.task` indexes. A user's tasks follow in the order in which they
are given. `use_tasks` adds them once, when a program starts: `train` takes them from the config key `tasks`, the other
commands from `--task-modules`, and the library from `ask(task=...)` and `load(tasks=...)`. All other code looks a task
up in `TASKS` by the name in an Example, so that functions do not have to pass tasks along; processes that decode get
the names that they need in their DataConfig. There is no other way to add a task: nothing that is read from disk (a
checkpoint's config.json, a list of Examples) ever imports a module.
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
TASK_NAMES = tuple(TASKS)  # of the nine benchmark tasks
FLAG = "--task-modules"


def use_tasks(tasks: Iterable[Task | str], where: str = FLAG) -> None:
    """Add the tasks of a user to `TASKS`: Tasks, or names of modules as `from_modules` reads them.

    Adding a task again changes nothing. A task that its module defines anew replaces the former one, as when a cell of
    a notebook is run again. Raises InputError for a name that another task has, and for the same reasons as
    `from_modules`.
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
    """Return the module and the name of the function `stats` of a task, which identify a task that is defined again."""
    return task.stats.__module__, getattr(task.stats, "__qualname__", "")


def from_modules(text: str, where: str = FLAG) -> list[Task]:
    """Import the modules of a text such as "package.module:NAME,package.other", and return their tasks.

    A part with a NAME gives that one task, a part without one every Task of the module. Raises InputError for a module
    that cannot be imported, and for a NAME that the module does not hold or that is no Task.
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
    """Add the option --task-modules to a command; `use_tasks` reads its value."""
    parser.add_argument(
        FLAG,
        type=Modules(),
        default="",
        metavar="A.B:NAME,C.D",
        help="modules that define tasks of your own; they are imported (docs/your_data.md)",
    )
