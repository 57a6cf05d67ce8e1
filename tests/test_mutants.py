"""Mutation testing: which changes are made, that verdicts are kept as long as they hold, and that a trial tells."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.changes import mutants
from tests.mutants.journal import Journal, equivalents, identity
from tests.mutants.rooms import ROOMS

REPOSITORY = Path(__file__).parent.parent


def changed(source: str) -> set[str]:
    """What becomes of the lines of a source that its mutants change."""
    return {mutant.after for mutant in mutants(source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a + 2", {"x = a - 2", "x = a + 3"}),
        ("x = a <= b", {"x = a < b"}),
        ("x = a not in b", {"x = a in b"}),
        ("x = a and b or c", {"x = a or b or c", "x = a and b and c"}),
        ("x = not a", {"x = (a)"}),
        ("x = f(a, n=b)", {"x = f(a, )"}),
        ("x = jnp.where(a, b, c)", {"x = jnp.where(a, c, b)"}),
        ("x = jnp.exp(a.max())", {"x = (a.max())", "x = jnp.exp(a.min())"}),
        ("x = 'é' + a[:n]", {"x = 'XXé' + a[:n]", "x = 'é' - a[:n]", "x = 'é' + a[:]"}),
        ("x += y", {"x -= y"}),
        ("f(x)", {"pass"}),
        ("def f(n=1):\n    if n:\n        return 0", {"def f(n=2):", "if False:", "return 1"}),
        ("if a:\n    x = b\nelse:\n    x = c", {"if not (a):"}),
        ("x = f'{a + 1}'", {'x = "XX"'}),
    ],
)
def test_changes_of_a_line(source, expected):
    assert changed(source) == expected


def test_documentation_annotations_and_messages_are_left_alone():
    source = (
        '"""A file of 1 or 2."""\nimport a.b\nx: Literal["a", 1]\nassert x == 1, "no"\n'
        'class P(Protocol):\n    def f(self, n: int = 1) -> int:\n        """Return n."""\n'
        'def f(y: "int | None") -> Literal[1]:\n    """Return 1."""\n    raise InputError("file", "field", f"{1}")\n'
        'if __name__ == "__main__":\n    f(1)\n'
    )
    assert changed(source) == set()


@pytest.mark.parametrize("module", [module for room in ROOMS.values() for module in room])
def test_every_room_has_its_files_and_every_mutant_is_a_program(module):
    tests = next(room[module] for room in ROOMS.values() if module in room)
    assert all((REPOSITORY / test).exists() for test in tests)
    source = (REPOSITORY / module).read_text()
    for mutant in mutants(source)[::60]:
        compile(mutant.apply(source), module, "exec")


def test_every_equivalent_mutant_is_still_one_that_would_be_made():
    modules = {module for room in ROOMS.values() for module in room}
    made = {identity(module, mutant) for module in modules for mutant in mutants((REPOSITORY / module).read_text())}
    gone = equivalents().keys() - made
    assert not gone, "changed since they were listed in tests/mutants/equivalent.json: look at them again"
    assert all(len(reason) > 20 for reason in equivalents().values())


def test_a_verdict_is_kept_while_the_test_that_gave_it_stays(tmp_path):
    test = tmp_path / "test_x.py"
    test.write_text("def test_a():\n    assert f(1) == 2\n\ndef test_b():\n    assert True\n")
    mutant, survivor = mutants("x = a + 2")
    journal = Journal(tmp_path / "journal.jsonl", tmp_path)
    key, other = (journal.key("x = a + 2", each) for each in (mutant, survivor))
    journal.add(key, "test_x.py::test_a[1]", "tests", "x.py", mutant)
    journal.add(other, "", "tests", "x.py", survivor)

    def again(tests: str) -> list[str | None]:
        from tests.mutants import journal as module

        module._test_text.cache_clear()
        read = Journal(tmp_path / "journal.jsonl", tmp_path)
        return [read.killer(each, tests) for each in (key, other)]

    assert again("tests") == ["test_x.py::test_a[1]", ""]
    test.write_text("# more\n" + test.read_text().replace("assert True", "assert g(1)"))
    assert again("changed") == ["test_x.py::test_a[1]", None], "a survivor is tried with the new tests"
    test.write_text(test.read_text().replace("== 2", "== 3"))
    assert again("changed") == [None, None], "the test that killed it is another one"
    with (tmp_path / "journal.jsonl").open("a") as broken:
        broken.write('{"key": "abc')
    assert again("tests") == [None, ""]


@pytest.mark.slow
def test_a_run_tells_killed_from_survived_and_goes_on_where_it_stopped(tmp_path):
    test = "from pure.part import clip\n\n\ndef test_clip():\n    assert clip(4) == 4\n    assert clip(9) == 5\n"
    files = {
        "pure/part.py": "def clip(x):\n    return min(x, 5)\n\n\ndef new(x):\n    return x + 1\n",
        "tests/test_part.py": test,
        "setup.cfg": "[tool:pytest]\naddopts = -q\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    code = (
        "import pathlib, sys; from tests.mutants import __main__ as m, trial\n"
        f"m.CHECKOUT = pathlib.Path({str(tmp_path)!r}); trial.LIBRARIES = ('pytest',)\n"
        "m.ROOMS['losses'] = {'pure/part.py': ('tests/test_part.py',)}\n"
        "sys.exit(m.main())"
    )

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "losses", *options]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    first = run("--minutes", "0.001")
    assert first.returncode == 3 and "stopped" in first.stdout, first.stderr
    whole = run("--jobs", "2")
    assert whole.returncode == 1, whole.stdout + whole.stderr
    assert "2 of 4 killed (50%; 0 by the time limit)" in whole.stdout
    assert whole.stdout.count("+ return x - 1") == 2 and "min(x, 6)" not in whole.stdout
    assert (tmp_path / "pure/part.py").read_text() == files["pure/part.py"]
    lines = [json.loads(line) for line in (tmp_path / "runs/mutants/journal.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and {line["by"] for line in lines} == {"", "tests/test_part.py::test_clip"}
    assert "to try" not in run().stdout, "all verdicts are known"
