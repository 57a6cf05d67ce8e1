"""A writer of metrics beside TensorBoard: any module with the shape of wandb, such as wandb or trackio.

It is asked for by the config key `log_writer` and called as

    run = module.init(project=..., name=..., config=..., resume="allow", id=...)
    module.log({"loss": 0.8, ...}, step=120)
    module.finish()

`id`, by which wandb continues the run of a workdir, and `dir`, where it puts its files, are left out where `init` does
not take them. Nothing that the module raises ends a run: a warning is printed once.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crab_jax.io import paths
from crab_jax.io.errors import InputError

PROJECT = "crab_jax"


class LogWriter:
    """The writer of one run. Without a module, it writes nothing."""

    def __init__(self, module: Any, name: str = ""):
        self._module, self._name, self._told = module, name, False

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step."""
        self._call(lambda: self._module.log(dict(values), step=step))

    def close(self) -> None:
        """End the run of the writer."""
        self._call(lambda: self._module.finish())

    def _call(self, call: Callable[[], Any]) -> bool:
        """Return whether a call passed; warn the first time that one does not."""
        if self._module is None:
            return False
        try:
            call()
            return True
        except Exception as error:
            if not self._told:
                reason = " ".join(str(error).split()) or type(error).__name__
                print(
                    f"warning: log_writer {self._name}: {reason:.200}; training goes on, and metrics.jsonl has what is "
                    "missing there",
                    file=sys.stderr,
                    flush=True,
                )
            self._told = True
            return False


def module_of(spec: str) -> Any:
    """Import the module of a `log_writer`, "module" or "module:project"; None for "". Raises InputError."""
    name = spec.partition(":")[0]
    if not name:
        return None
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        missing = getattr(error, "name", None) or name
        raise InputError("--config", "log_writer", f"{missing} is not installed", f"pip install {name}") from None
    for function in ("init", "log", "finish"):
        if not callable(getattr(module, function, None)):
            if module.__spec__ is None or module.__spec__.origin is None:  # a folder of that name, as wandb leaves
                raise InputError("--config", "log_writer", f"{name} is not installed", f"pip install {name}")
            raise InputError(
                "--config", "log_writer", f"{name} has no {function}()", "name wandb, trackio or their like"
            )
    return module


def open_writer(spec: str, workdir: Path, config: Mapping[str, Any]) -> LogWriter:
    """Return the writer of a run, which continues the one of an earlier process on the same workdir.

    If the module cannot begin, for example without a network, nothing is written to it. Raises InputError as
    `module_of`.
    """
    module, project = module_of(spec), spec.partition(":")[2] or PROJECT
    writer, full = LogWriter(module, spec), str(paths.absolute(workdir))
    if module is None:
        return writer
    options: dict[str, Any] = {"project": project, "name": workdir.name, "config": dict(config), "resume": "allow"}
    own = {"id": hashlib.blake2b(full.encode(), digest_size=8).hexdigest(), "dir": full}
    if paths.is_remote(workdir):  # it writes to a disk
        del own["dir"]
    parameters = inspect.signature(module.init).parameters
    options |= {key: value for key, value in own.items() if key in parameters}
    return writer if writer._call(lambda: module.init(**options)) else LogWriter(None)
