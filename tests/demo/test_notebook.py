"""The notebook of the documentation runs from its first cell to its last, and what it shows is what its text says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "story.ipynb"
# Read after the last cell, in the notebook's own process.
RESULTS = """
import json
names = ("questions", "before", "unguarded", "guarded", "refused", "report_before", "report_after")
print(json.dumps({name: globals()[name] for name in names} | {"answers": [world.forget[0].answer, world.test[0].answer]}))
"""


def read_notebook() -> Any:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra docs (make docs)")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_in_git_without_outputs():
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert len(cells) >= 10
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.demo
@pytest.mark.timeout(900)
def test_notebook_runs_and_shows_what_it_says(shared_folder):
    """It finds the model that the demo has trained, or trains it."""
    nbclient = pytest.importorskip("nbclient", reason="needs the extra docs (make docs)")
    nbformat = pytest.importorskip("nbformat")
    notebook = read_notebook()
    notebook.cells.append(nbformat.v4.new_code_cell(RESULTS))
    nbclient.NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(shared_folder)}}).execute()

    last = notebook.cells[-1].outputs
    shown = json.loads("".join(output.text for output in last if output.output_type == "stream" and output.name == "stdout"))
    forgotten, kept = shown["answers"]
    assert shown["before"] == [forgotten, kept]
    assert shown["unguarded"][0] != forgotten
    assert shown["unguarded"][1] == kept
    assert shown["refused"] == [True, False]
    assert shown["guarded"][0] != shown["unguarded"][0]
    assert shown["guarded"][1] == kept
    after = shown["report_after"]["sets"]
    assert after["forgotten"]["extraction_strength"] <= 0.1
    assert after["forgotten"]["refused"] >= 0.9
    assert after["never seen"]["refused"] <= 0.05
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1
