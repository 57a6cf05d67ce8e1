"""All that is known about a task stands in its file: nothing else asks for a task by its name."""

import ast
from pathlib import Path

import pytest

from crab_jax.tasks import TASK_NAMES

REPOSITORY = Path(__file__).parents[2]
# Where names of tasks may be looked at, and why.
ALLOWED = {
    "crab_jax/tasks/": "the files of the tasks",
    "crab_jax/tiny_world/": "the recipe of the tiny world, which trains some of the nine in turn, and its demo",
    "crab_jax/aot/hlo.py": "s4 is an integer of four bits",
    "data_pipelines/sources/": "releases, some of which have the name of their task",
    "data_pipelines/datasets.py": "releases",
    "data_pipelines/leaks.py": "releases",
}
TABLES = ("data_pipelines/av_uie/",)  # may have tables of the paper's prompts and texts by the names of the nine


def is_name(node: ast.AST | None) -> bool:
    """Whether a node is the name of a task, or holds one."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(is_name, node.elts))
    return isinstance(node, ast.Constant) and node.value in TASK_NAMES


def asked(source: str, tables: bool = False) -> list[int]:
    """The lines of a source that compare with the name of a task, match one, look one up or choose by one."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            found = any(map(is_name, (node.left, *node.comparators)))
        elif isinstance(node, ast.MatchValue):
            found = is_name(node.value)
        elif isinstance(node, ast.Subscript):
            found = is_name(node.slice)
        elif isinstance(node, ast.Dict):
            found = not tables and any(map(is_name, node.keys))
        else:
            found = False
        if found:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "task == 'ave'",
        "'ave' != task",
        "task in ('avqa', 'ref-avs')",
        "task in ['s4']",
        "match task:\n    case 'ms3' | 'avss': pass",
        "TASKS['arig'].parse(text)",
        "{'avcap': 1}[task]",
    ],
)
def test_a_choice_by_name_is_seen(source):
    assert asked(source)


def test_other_words_are_not_seen():
    assert not asked("x == 'average' or y['key'] in ('a', 'b')\nmatch x:\n    case 'z': pass\nread(task='ave')")


def test_no_other_file_chooses_by_the_name_of_a_task():
    found = {}
    for package in ("crab_jax", "data_pipelines"):
        for file in sorted((REPOSITORY / package).glob("**/*.py")):
            name = str(file.relative_to(REPOSITORY))
            if not name.startswith(tuple(ALLOWED)) and (lines := asked(file.read_text(), name.startswith(TABLES))):
                found[name] = lines
    assert not found


def test_every_exception_is_needed():
    for place in ALLOWED:
        if place != "crab_jax/tasks/":
            path = REPOSITORY / place
            files = [path] if path.is_file() else list(path.glob("**/*.py"))
            assert any(asked(file.read_text()) for file in files), f"{place} needs no exception"
