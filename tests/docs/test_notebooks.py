"""The notebooks run, and show what they computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if name == "openmoji":
        pytest.importorskip("resvg_py")
        monkeypatch.setenv("OPENMOJI_EPOCHS", "1")
        monkeypatch.setenv("OPENMOJI_OUTPUT", str(tmp_path / "openmoji"))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    # The longest cell takes minutes on two idle cores, and has taken half an hour on busy ones.
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=5400, kernel_name="python3", resources=resources).execute()
    expected = [len(cell["outputs"]) for cell in cells(name) if cell["cell_type"] == "code"]
    assert [len(cell["outputs"]) for cell in notebook.cells if cell["cell_type"] == "code"] == expected
