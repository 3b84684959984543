"""A study's teacher: its training, and the variants of it that its students are trained with."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from clip_evaluation.model import ClipModel
from examples_common.trainer import checkpoint_of, place_model
from rich.console import Console

from miniature_paper.grid import model_folder
from miniature_paper.records import Store
from miniature_paper.runs import Workshop
from rankloss_features.command import main as write_features
from rankloss_features.folder import read_about

from .study import Study
from .trials import teacher_folder

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
    flags = [dict(trial.changes) for tries in study.arms.values() for trial in tries]
    for name in {found["--distill-model"].partition(":")[2] for found in flags if "--distill-model" in found}:
        base, _, factor = name.partition("@")
        if factor and not (workshop.output / name / _WEIGHTS).is_file():
            state = torch.load(workshop.output / base / _WEIGHTS, weights_only=True)
            state["logit_scale"] = state["logit_scale"] + math.log(float(factor))
            _place(workshop.output / name, state)
    side = "--rankclip-reference-features"
    for name in {found[side] for found in flags if side in found}:
        if not (read_about(workshop.output / name) or {}).get("complete"):
            _write_texts(workshop.output / name, workshop.output / workshop.tables.tables[study.grid.pairs])
    return True


def _place(folder: Path, state: dict[str, Any]) -> None:
    place_model(model_folder("teacher"), folder)
    torch.save(state, folder / f".{_WEIGHTS}")
    (folder / f".{_WEIGHTS}").rename(folder / _WEIGHTS)  # atomic


def _write_texts(path: Path, table: Path) -> None:
    """A folder of the teacher's features of every text of a table, in its order."""
    texts = pd.read_csv(table, sep="\t", keep_default_na=False)["title"].tolist()
    features = ClipModel(f"local-dir:{path.parent}").text_features(texts)
    stored = path.with_name(f".{path.name}")
    np.savez(stored, text_features=features.numpy())
    given = {"--features": stored, "--data": table, "--output": path, "--dtype": "float32", "--workers": 0}
    if write_features([str(x) for pair in given.items() for x in pair]):
        raise RuntimeError(f"{path} could not be written")
