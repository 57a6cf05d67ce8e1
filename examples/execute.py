"""Run the notebooks of this folder and keep what they show.

`make notebooks` runs all, `python examples/execute.py NAME.ipynb` one. Each runs in an
empty folder of its own, as a user's would. What is written on stderr (progress) is not kept.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(file: Path) -> None:
    """Run a notebook from its first cell to its last and write it with its outputs."""
    notebook = nbformat.read(file, as_version=4)
    notebook.metadata = nbformat.from_dict(METADATA)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1200, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # of a picture that is there as PNG
    nbformat.write(notebook, file)
    print(f"{file.name}: {len(notebook.cells)} cells, {file.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.name for path in HERE.glob("*.ipynb")):
        execute(HERE / name)
