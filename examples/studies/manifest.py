"""The finished studies: how each is repeated, and the hashes of all that it consists of.

``python -m studies.manifest`` writes ``manifest.sha256``, which ``sha256sum --check`` reads, too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
MANIFEST = HERE / "manifest.sha256"
FINISHED: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "finished.yaml").read_text(encoding="utf-8"))
KINDS = ("plan", "settings", "records", "report")


def files(name: str) -> list[Path]:
    """Return all files of a finished study, in order."""
    paths = [HERE / path for kind in KINDS for path in FINISHED[name][kind]]
    found = (path.rglob("*") if path.is_dir() else [path] for path in paths)
    return sorted(path for of in found for path in of if path.is_file() and not path.name.startswith("."))


def lines() -> list[str]:
    """Return the manifest's lines: a hash and a file of any finished study."""
    every = sorted({path for name in FINISHED for path in files(name)})
    return [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(HERE).as_posix()}"
        for path in every
    ]


def commands(name: str, seed: int | None = None) -> list[str]:
    """Return the two commands that repeat a finished study: its code without its records, and its run.

    Args:
        name: Of the study.
        seed: The one whose trainings are repeated; None: all trainings.
    """
    study = FINISHED[name]
    folder = study.get("folder", "examples/studies")
    records = " ".join(f"../study/{folder}/{path}" for path in study["records"])
    left_out = f"rm -r {records}"
    if seed is not None:
        left_out = f"find {records} -name records.jsonl -exec sed -i '/\"seed\":{seed}[,}}]/d' {{}} +"
    return [
        f"git worktree add ../study {study['commit']} && {left_out}",
        f"make -C ../study {study['command']}",
    ]


if __name__ == "__main__":
    MANIFEST.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
