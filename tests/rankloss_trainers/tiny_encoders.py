"""Two tiny encoders in the place of those that an extra installs, and the folder of both in one space."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_teacher
from torch import Tensor

from rankloss_features import caching, sources
from rankloss_features.caching import Spec
from rankloss_features.data import Sample
from rankloss_features.folder import NAMES
from rankloss_features.teachers import Encoder, Teacher
from rankloss_trainers import console

FLAG = "image=a,text=b,align"
"""The two encoders in one space, as the option ``teacher`` names them."""
_IMAGES, _TEXTS = NAMES


def letters_of_names(samples: list[Sample]) -> Tensor:
    """The counts of letters in the pictures' names, which tell the pictures apart."""
    return tiny_teacher.letters([sample._replace(caption=sample.name) for sample in samples])


def put_tiny_encoders(patch: pytest.MonkeyPatch) -> None:
    """Put encoders of names and captions in the place of those that an extra installs."""
    whole = tiny_teacher.teacher()
    texts = whole.encoders[_TEXTS]
    encoders = {_IMAGES: Encoder(letters_of_names, texts.encode, texts.width), _TEXTS: texts}
    patch.setattr(sources, "load", lambda *_: Teacher(whole.about, encoders, spaces="separate"))
    patch.setattr(Spec, "check", lambda spec: spec)  # their names are of no encoder that could be installed
    patch.setattr(caching, "_WORKERS", 0)  # the few rows are read in this process


class TinyEncoders:
    """The change of a run that puts the tiny encoders into its process."""

    def install(self, _: Any) -> None:
        put_tiny_encoders(pytest.MonkeyPatch())


def write_aligned(folder: str, *data: str) -> None:
    """Write the folder of the command; the encoders have been put in place."""
    given = ["--image-encoder", "a", "--text-encoder", "b", "--align", "--workers", "0", "--output", folder]
    assert console.main(["features", *given, *data]) == 0
