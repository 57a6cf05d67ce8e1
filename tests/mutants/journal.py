"""Verdicts that outlive a run, and the mutants of which somebody has shown that no test can tell them apart."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

from tests.mutants.changes import Mutant

EQUIVALENT = Path(__file__).with_name("equivalent.json")


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@functools.cache
def _test_text(file: Path, name: str) -> str | None:
    """Return the source of a test of a file, or None where there is none of that name."""
    if not file.is_file():
        return None
    text = file.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return ast.unparse(node)
    return None


def _test_digest(checkout: Path, test: str) -> str:
    """Return a digest of the test that killed a mutant, "" where it is gone."""
    file, _, name = test.partition("::")
    if not name:
        return test  # "import", "timeout", "crash"
    text = _test_text(checkout / file, name.split("::")[-1].split("[")[0])
    return "" if text is None else digest(text)


@dataclasses.dataclass
class Journal:
    """Verdicts by (content of the file, mutant), one JSON object per line.

    A mutant stays killed while the test that killed it stays as it is, and alive while all test files of its room do.
    """

    file: Path
    checkout: Path

    def __post_init__(self) -> None:
        self.lines: dict[str, dict[str, str]] = {}
        if self.file.is_file():
            for line in self.file.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # broken off
                    continue
                self.lines[entry["key"]] = entry

    def key(self, source: str, mutant: Mutant) -> str:
        return digest(source, str(mutant.start), str(mutant.end), mutant.new)

    def killer(self, key: str, tests: str) -> str | None:
        """Return who killed a mutant, "" where it is known to survive, None where that is to be tried (again)."""
        entry = self.lines.get(key)
        if entry is None:
            return None
        if entry["by"]:
            return entry["by"] if entry["test"] and entry["test"] == _test_digest(self.checkout, entry["by"]) else None
        return "" if entry["test"] == tests else None

    def add(self, key: str, by: str, tests: str, module: str, mutant: Mutant) -> None:
        """Write down a verdict; `tests` is a digest of the test files of the room."""
        entry = {"key": key, "by": by, "test": _test_digest(self.checkout, by) if by else tests, "file": module}
        self.lines[key] = {**entry, "before": mutant.before, "after": mutant.after}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps(self.lines[key]) + "\n")


def equivalents(file: Path = EQUIVALENT) -> dict[tuple[str, str, str, str], str]:
    """Return (file, function, line before, line after) -> the reason why no test can tell."""
    return {
        (entry["file"], entry["function"], entry["before"], entry["after"]): entry["reason"]
        for entry in json.loads(file.read_text())
    }


def identity(module: str, mutant: Mutant) -> tuple[str, str, str, str]:
    """Return by what a mutant is found in the list of equivalent ones."""
    return module, mutant.function, mutant.before, mutant.after
