"""Files that bring code: a pickle, and a tokenizer beside weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Pickled:
    """An object that makes a folder where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.made,)


def edit(file: Path, **entries: Any) -> None:
    """Change entries of a JSON file, or begin one."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **entries}))


def bring_tokenizer(folder: Path, made: Path) -> None:
    """Add a tokenizer to a folder, in a module that makes a folder where it is imported."""
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(made)!r})\n")
    classes = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="TheirTokenizer", auto_map=classes)


def trust_tokenizer(folder: Path, named: str) -> None:
    """Have a folder of open_clip ask for a tokenizer of this name, and for trust in its code."""
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())["model_cfg"]
    options = {"hf_tokenizer_name": named, "tokenizer_kwargs": {"trust_remote_code": True}}
    edit(file, model_cfg={**config, "text_cfg": {**config["text_cfg"], **options}})
