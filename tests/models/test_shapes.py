"""Every module says which arrays it takes and gives."""

import ast
import re
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[2] / "crab_jax" / "models"


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.py")), ids=lambda file: file.name)
def test_every_call_is_annotated_and_documented_with_shapes(file):
    for module in ast.walk(ast.parse(file.read_text())):
        if not isinstance(module, ast.ClassDef):
            continue
        for call in module.body:
            if isinstance(call, ast.FunctionDef) and call.name == "__call__" and file.name != "protocol.py":
                where = f"{file.name}: {module.name}"
                assert call.returns is not None, f"{where} does not say what it gives"
                assert all(arg.annotation is not None for arg in call.args.args[1:]), f"{where} has bare arguments"
                said = (ast.get_docstring(call) or "") + (ast.get_docstring(module) or "")
                assert re.search(r"\[[^\]]*\]", said) or "pass over" in said, f"{where} says no shapes"
