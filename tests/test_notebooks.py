"""The notebooks of examples/: their code runs in any folder and says what the committed outputs say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+(\.\d+)?")  # what rounding may change on another machine


def code_cells(notebook: Path) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def printed(cells: list[dict]) -> str:
    """What the committed outputs of cells say as text."""
    outputs = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "stream"]
    return "".join("".join(output["text"]) for output in outputs)


def test_all_three_are_there_and_small():
    assert {path.stem for path in NOTEBOOKS} == {"try_a_clip", "inside_the_router", "add_a_task"}
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 600_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_committed_as_they_ran(notebook):
    """From the first cell to the last, without an error."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert printed(cells)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_their_code_says_what_they_show(notebook, tmp_path):
    cells = code_cells(notebook)
    script = tmp_path / "script.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    path = f"import sys; sys.path[0] = {str(EXAMPLES.parent)!r}; sys.argv = ['']\n"
    run = f"{path}exec(compile(open({str(script)!r}).read(), 'notebook', 'exec'), globals())"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said, shown = (NUMBER.sub("#", text) for text in (done.stdout, printed(cells)))
    assert said == shown
