"""Pictures of the data are those that the trainers see."""

from __future__ import annotations

import inspect
import io
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip_train.data
import pytest
from PIL import Image

from rankloss_features.data import IMAGES, Table


def test_the_picture_of_a_sample_is_the_one_the_trainer_prefers() -> None:
    (listed,) = re.findall(r'rename\(image="([^"]+)"', inspect.getsource(open_clip_train.data))
    assert tuple(listed.split(";")) == IMAGES


@pytest.mark.parametrize("kind", ["datasets", "csv"])
@pytest.mark.parametrize("has_bytes", [True, False])
def test_the_cameras_orientation_counts_where_it_counts_in_training(
    tmp_path: Path, kind: str, has_bytes: bool
) -> None:
    picture, exif = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 2, 3)), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    image: Any = {"bytes": buffer.getvalue(), "path": None} if has_bytes else str(tmp_path / "a.png")
    data = datasets.Dataset.from_dict({"image": [image], "caption": ["a"]})
    data = data.cast_column("image", datasets.Image())
    (samples,) = Table(data, "image", "caption", kind=kind).read(0, [(0, 1)])
    trained = data[0]["image"].convert("RGB") if kind == "datasets" else picture
    np.testing.assert_array_equal(np.asarray(samples[0].open()), np.asarray(trained))
    assert data[0]["image"].size == (4, 2) != picture.size
