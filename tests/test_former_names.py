"""Modules that have moved are imported by their former names as well, and are then the same modules."""

import importlib
import subprocess
import sys

import pytest

from crab_jax.former_names import FORMER


@pytest.mark.parametrize("name", FORMER)
def test_a_former_name_is_the_module_of_today(name):
    spec = importlib.import_module(FORMER[name]).__spec__
    assert importlib.import_module(name) is importlib.import_module(FORMER[name])
    assert importlib.import_module(FORMER[name]).__spec__ is spec and spec.name == FORMER[name]


def test_former_imports_in_a_fresh_process():
    code = """
from crab_jax import overlay, runs
from crab_jax.errors import InputError
from crab_jax.predictions import load_mask, mask_picture
from crab_jax.checkpoints import RunCheckpoints, save_packed, stored_params
from crab_jax.runs import load_model, read_examples
import crab_jax
assert InputError is crab_jax.InputError and runs.load_config and overlay.overlay_mask and callable(crab_jax.tiny)
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


def test_what_never_was_is_not_there():
    with pytest.raises(ImportError):
        importlib.import_module("crab_jax.no_such_module")
    with pytest.raises(ImportError):
        from crab_jax.runs import no_such_name  # noqa: F401
