"""Which rooms may know which: the import rules of docs/architecture.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# What data needs of the library: files, errors, text, tasks, and what draws pages; nothing of a model or a run.
BELOW = {"bounds", "errors", "files", "locks", "packaged", "progress", "structured", "tasks"}
PAGES = {"charts", "overlay", "page"}


def imports(file: Path) -> set[str]:
    """The modules of ours that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] in ("crab_jax", "data_pipelines", "configs")}


def rooms(folder: str, pattern: str = "**/*.py") -> dict[str, set[str]]:
    """File -> what it imports of ours."""
    return {str(file.relative_to(REPOSITORY)): imports(file) for file in (REPOSITORY / folder).glob(pattern)}


def within(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)}


@pytest.mark.parametrize(
    ("folder", "never"),
    [
        ("crab_jax/models", ("crab_jax.tasks", "data_pipelines", "crab_jax.config", "crab_jax.runs", "crab_jax.optim")),
        ("crab_jax/tasks", ("crab_jax.models", "data_pipelines")),
        ("crab_jax", ("configs",)),
        ("data_pipelines", ("configs",)),
    ],
)
def test_a_room_does_not_know_those_above_it(folder, never):
    broken = {file: found for file, names in rooms(folder).items() if (found := within(names, *never))}
    assert not broken


def test_data_knows_of_the_library_only_what_lies_below_it():
    viewers = {"data_pipelines/sample.py", "data_pipelines/av_uie/card.py", "data_pipelines/av_uie/review.py"}
    for file, names in rooms("data_pipelines").items():
        known = {name.split(".")[1] for name in names if name.startswith("crab_jax.")}
        assert known <= BELOW | (PAGES if file in viewers else set()), (file, known - BELOW)


def test_no_module_of_the_library_imports_in_a_circle():
    modules = {
        file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): names
        for folder in ("crab_jax", "data_pipelines")
        for file, names in rooms(folder).items()
    }
    # A module does not wait for the package that it lies in.
    del modules["crab_jax"]  # which imports nothing until it is asked
    top = {
        name: {other for other in names if other in modules and not f"{name}.".startswith(f"{other}.")}
        for name, names in modules.items()
    }
    order: list[str] = []
    while ready := [name for name, names in top.items() if name not in order and names <= set(order)]:
        order += ready
    assert set(order) == top.keys(), "in a circle: " + ", ".join(sorted(top.keys() - set(order)))


def test_the_library_is_imported_lazily_and_predict_shows_its_help_without_jax_devices():
    code = "import sys, crab_jax; print(len([m for m in sys.modules if m.split('.')[0] in ('jax', 'numpy', 'flax')]))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"
