"""How people write values on the command line: read as they are meant, or refused in one line."""

import pytest

from crab_jax.config import parse_flags
from crab_jax.io.errors import InputError


def parsed(*overrides: str):
    return parse_flags(["train", "--config=configs/tiny.py", *overrides], None, workdir=False)[0]


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("0.0001", 1e-4), (".0001", 1e-4), ("1", 1.0)])
def test_floats(text, value):
    assert parsed(f"--config.optim.lr={text}").optim.lr == value


@pytest.mark.parametrize(("text", "value"), [("200", 200), ("1_000", 1000)])
def test_whole_numbers(text, value):
    assert parsed(f"--config.steps={text}").steps == value


@pytest.mark.parametrize("text", ["(256, 512)", "(256,512)", "[256, 512]", "256,512"])
def test_lists(text):
    assert tuple(parsed(f"--config.data.lengths={text}").data.lengths) == (256, 512)


@pytest.mark.parametrize(
    ("text", "value"), [("False", False), ("false", False), ("0", False), ("True", True), ("true", True), ("1", True)]
)
def test_truth(text, value):
    assert parsed(f"--config.data.pad_short_audio={text}").data.pad_short_audio is value


def test_a_flag_and_its_value_may_stand_apart():
    assert parsed("--config.optim.lr", "3e-4").optim.lr == 3e-4


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("--config.steps=1e3", "steps"),
        ("--config.optim.lr=None", "lr"),
        ("--config.optim.rl=1e-4", "rl"),
        ("--config.data.lengths=()", "lengths"),
        ("--config.steps=", "steps"),
        ("--config.steps=ten", "steps"),
        ("--config.optim.lr=1e-4x", "lr"),
        ("--config.optim=3", "optim"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(text, named):
    with pytest.raises(InputError, match=named) as refused:
        parsed(text)
    assert "\n" not in str(refused.value)


def test_a_mistyped_key_is_answered_with_the_right_one():
    with pytest.raises(InputError, match="batch_size"):
        parsed("--config.data.batchsize=4")
