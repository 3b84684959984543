"""The data set and its trainings: open_clip's command, then every measure of the checkpoint."""

from __future__ import annotations

import argparse
import asyncio
import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from openmoji_demo import trainer
from openmoji_demo.model import ClipModel
from openmoji_demo.trainer import place_model
from PIL import Image
from torch.nn.functional import normalize

from rankloss_features import packages
from rankloss_features.command import main as write_features
from rankloss_features.folder import Features, read_about
from studies import icons
from studies.distillation import principal_components
from studies.records import Record

from . import data
from .measure import measured
from .settings import MODELS, Attempt, Setting, size_of

_WEIGHTS = "open_clip_pytorch_model.bin"  # what open_clip looks for in a local-dir: model


class Miniature:
    """The icons as the trainer reads them, and the folder that trainings are started in."""

    def __init__(
        self, options: argparse.Namespace, pairs: Iterable[int], teacher: Attempt | None = None
    ) -> None:
        self.root: Path = options.output / "miniature"
        self.root.mkdir(parents=True, exist_ok=True)
        self.icons = icons.built(options.icons)
        self.tables = data.prepare(self.icons, self.root, list(pairs))
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher = teacher
        for folder in MODELS.values():
            place_model(folder, self.root / "models" / folder.name)

    def fingerprint(self, setting: Setting | Attempt) -> str:
        """Fingerprint of the pairs that are trained on and of everything that is measured on."""
        return self.tables.digests[setting.pairs]

    def train(self, setting: Setting | Attempt) -> Record:
        """Train and measure a model; its weights are deleted, but the teacher's."""
        has_teacher = self.teacher is not None and setting != self.teacher
        if has_teacher:
            self._prepare_teacher(setting)
        folder = self.root / "runs" / f"{setting.arm}-{setting.side}-seed{setting.seed}"
        log = self._trained(setting, folder)
        began = time.monotonic()
        name = f"local-dir:{self.root / setting.job().model}"
        model = ClipModel(name, checkpoint=log.checkpoint, device=self.device)
        of = ClipModel(f"local-dir:{self._teachers_folder}", device=self.device) if has_teacher else None
        found = measured(setting, model, self.icons, of)
        if setting == self.teacher:
            self._place(self._teachers_folder, log.checkpoint)
        shutil.rmtree(folder)
        seconds = {"training": log.seconds, "measuring": time.monotonic() - began}
        return {
            **found,
            "training": {"first": log.first, "last": log.last},
            "seconds": {stage: round(spent, 1) for stage, spent in seconds.items()},
        }

    def _trained(self, setting: Setting | Attempt, folder: Path) -> trainer.Log:
        job, on_cpu = setting.job(), self.device == "cpu"
        table = self.tables.tables[setting.pairs]
        more = ("--log-every-n-steps", "20")
        command = job.command(table, folder.name, device=self.device, workers=0 if on_cpu else 4, more=more)
        return asyncio.run(trainer.train(job, command, folder, root=self.root, threads=1 if on_cpu else None))

    # --- the teacher, and the files that its students are trained with ---

    @property
    def _teachers_folder(self) -> Path:
        assert self.teacher is not None
        return self.root / size_of(self.teacher.preset.removesuffix("-teacher")).teacher["folder"]

    def _prepare_teacher(self, student: Setting | Attempt) -> None:
        """Train the teacher if its weights are missing, and write what the student's arguments name of it.

        On another machine the teacher is trained again: the records of the test side name its weights.
        """
        folder = self._teachers_folder
        if not (folder / _WEIGHTS).is_file():
            assert self.teacher is not None
            run = self.root / "runs" / "teacher"
            self._place(folder, self._trained(self.teacher, run).checkpoint)
            shutil.rmtree(run)
        for word in student.job().arguments:
            path = self.root / word.removeprefix("local-dir:")
            if path.parent != folder.parent and path.parent != folder:
                continue
            factor = path.name.partition("@")[2]
            if factor and not (path / _WEIGHTS).is_file():
                self._place(path, folder / _WEIGHTS, math.log(float(factor)))
            elif path.suffix in (".npz", ".npy"):
                self._write(path)

    def _place(self, folder: Path, weights: Path, more_scale: float = 0.0) -> None:
        """Write weights as a model that open_clip finds, whole or not at all."""
        state = torch.load(weights, map_location="cpu", weights_only=True)
        state = {
            name.removeprefix("module."): value for name, value in state.get("state_dict", state).items()
        }
        state["logit_scale"] = state["logit_scale"] + more_scale
        place_model(MODELS["teacher"], folder)
        torch.save(state, folder / f".{_WEIGHTS}")
        (folder / f".{_WEIGHTS}").rename(folder / _WEIGHTS)

    def _write(self, path: Path) -> None:
        """Write one file about every row of a table of pairs, in its order, unless it is there.

        By its name: ``texts`` and ``features`` of the teacher, its principal ``components``, or
        ``sentences``, a sentence encoder's features of the texts.
        """
        kind, _, pairs = path.stem.partition("-")
        beside = path.with_name(f"features-{pairs}.npz")
        if kind == "components" and not path.is_file():
            self._write(beside)
            stored = [Features(str(beside)).arrays[f"{name}_features"] for name in ("image", "text")]
            width = ClipModel(f"local-dir:{MODELS['resnet']}").model.text_projection.shape[-1]
            np.save(path, principal_components(*stored, width).astype(np.float32))
        if kind == "components" or (read_about(path) or {}).get("complete"):
            return
        table = self.root / self.tables.tables[int(pairs)]
        rows = pd.read_csv(table, sep="\t", keep_default_na=False)
        partial = path.with_name(f".{path.name}")
        np.savez(partial, **self._features(kind, rows))
        given = {
            "--features": partial,
            "--data": table,
            "--output": path,
            "--dtype": "float32",
            "--workers": 0,
        }
        if write_features([str(x) for pair in given.items() for x in pair]):
            raise RuntimeError(f"{path} could not be written")
        partial.unlink()

    def _features(self, kind: str, rows: pd.DataFrame) -> dict[str, Any]:
        texts = rows["title"].tolist()
        if kind == "sentences":
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(str(packages.all_minilm_l6_v2()), device="cpu")
            options = {"batch_size": 256, "normalize_embeddings": True, "show_progress_bar": False}
            return {"text_features": model.encode(texts, **options)}
        teacher = ClipModel(f"local-dir:{self._teachers_folder}")
        found = {"text_features": teacher.text_features(texts).numpy()}
        if kind == "features":  # of the plain pictures, as they are measured
            pictures = [teacher.preprocess(Image.open(self.root / name)) for name in rows["filepath"]]
            found["image_features"] = normalize(teacher.image_features(pictures), dim=-1).numpy()
        return found
