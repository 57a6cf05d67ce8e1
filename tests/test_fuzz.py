"""A short campaign of the fuzzer: every kind of file and command line, without the commands that compile a model.

`make fuzz MINUTES=30` runs a longer one, with all commands.
"""

import random

import pytest

from tests.programs.fuzz import mutate
from tests.programs.fuzz.cage import Cage
from tests.programs.fuzz.campaign import EXTREMES, LINES, OVERRIDES, Campaign, cases, plans


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    made = Campaign(tmp_path_factory.mktemp("fuzz"), model=False)
    yield made
    made.close()


@pytest.mark.slow
def test_a_changed_file_is_read_or_refused_in_one_line(campaign):
    every = list(cases(campaign, 1, 0, slow=False))
    files = [case for name, case in every if name not in (LINES, OVERRIDES, EXTREMES)]
    few = [case for name, case in every if name in (LINES, OVERRIDES)][:30]
    extremes = [case for name, case in every if name == EXTREMES][:15]
    fallen = [said for case in (*files, *few, *extremes) if (said := case())]
    assert fallen == [], campaign.tally.failed
    assert sum(campaign.tally.tried.values()) > 120


def test_plans_are_the_same_each_time_and_all_different():
    assert plans(20, 3) == plans(20, 3) != plans(20, 4)
    assert len({plan.changes for plan in plans(200, 5)}) == 200


@pytest.mark.parametrize(
    "family",
    [mutate.MEDIA, mutate.PNG, mutate.JSON, mutate.TEXT, mutate.ARCHIVE, mutate.WEIGHTS],
    ids=["media", "png", "json", "text", "archive", "weights"],
)
def test_every_mutation_takes_any_bytes(family):
    chance = random.Random(0)
    for data in (
        b"",
        b"x",
        b"\x89PNG\r\n\x1a\n",
        b"PK\5\6" + bytes(18),
        b'{"a": [1]}\n{"b": 2}\n',
        chance.randbytes(500),
    ):
        for mutation in family:
            assert isinstance(mutation(data, random.Random(1)), bytes)


@pytest.mark.parametrize(
    ("code", "fell"),
    [
        ("raise ValueError", "traceback"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("while True: pass", "still ran"),
        ("import sys; sys.exit(2)", "0 lines of an error"),
        ("import sys; sys.exit('error: a: b; c')", "exit code 1"),
        ("print('fine')", ""),
    ],
)
def test_the_cage_sees_what_no_command_may_do(code, fell, tmp_path):
    (tmp_path / "tried.py").write_text(code)
    cage = Cage(tmp_path / "cage", tmp_path)
    try:
        said = cage.run("tried", [], 60 if "while" not in code else 3).fell((0, 2))
        assert fell in said and bool(said) == bool(fell)
    finally:
        cage.close()


def test_a_cage_whose_process_ended_goes_on_with_another(tmp_path):
    (tmp_path / "ends.py").write_text("import os; os._exit(7)")
    (tmp_path / "fine.py").write_text("print('fine')")
    cage = Cage(tmp_path / "cage", tmp_path)
    try:
        assert cage.run("ends", []).how == "ended its process: exit code 7"
        assert cage.run("fine", []).out == "fine\n"
    finally:
        cage.close()
