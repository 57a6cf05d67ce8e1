"""The guess test of docs/architecture.md: every file that a newcomer is sent to has what is looked for."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
ROW = re.compile(r"^\| ([^|`]+) \| `([^`]+\.py)` \| `(\w+)` \|$", re.MULTILINE)


def names_of(file: Path) -> set[str]:
    """What a module defines at its top, and the methods of its classes."""
    tree = ast.parse(file.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_every_place_that_a_newcomer_is_sent_to_has_what_is_looked_for():
    rows = ROW.findall((REPOSITORY / "docs" / "architecture.md").read_text())
    assert len(rows) >= 20
    for feature, file, name in rows:
        assert name in names_of(REPOSITORY / file), f"{feature}: {file} has no {name}"


def test_every_file_that_the_list_of_rooms_names_exists():
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    rooms = text[text.index("## Rooms") : text.index("A room imports only")]
    known = {
        path.name
        for folder in ("crab_jax", "data_pipelines", "configs", "tests")
        for path in (REPOSITORY / folder).rglob("*.py")
    } | {path.name for path in REPOSITORY.glob("*.py")}
    for name in re.findall(r"\b\w+\.py\b", rooms):
        assert name in known, name
    for package in ("crab_jax", "data_pipelines"):
        for folder in (REPOSITORY / package).iterdir():
            if (folder / "__init__.py").is_file():
                assert f"  {folder.name}/" in rooms, folder
    tops = {path.name for path in (REPOSITORY / "crab_jax").glob("*.py")} - {"__init__.py"}
    assert all(re.search(rf"\b{name}", rooms) for name in tops), tops
