"""Runs notebooks and stores what they show: ``make notebooks``, after ``make demo`` without a training."""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs/notebooks"


def run(notebook: Path) -> None:
    """Run every cell, and replace the file; a cell that fails leaves it as it was."""
    content = nbformat.read(notebook, as_version=4)
    NotebookClient(
        content,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(notebook.parent)}},
    ).execute()
    nbformat.write(content, notebook)


def main() -> None:
    """Run the notebooks that are named, or all."""
    names = [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all by default")
    arguments = parser.parse_args()
    for name in arguments.names or names:
        run(FOLDER / f"{name}.ipynb")
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
