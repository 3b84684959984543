"""The teacher of a run: losses of another package say by their attributes which teacher they can have."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import taught
import torch
from named_inputs import HOST
from torch import Tensor, nn

from batches import unit
from rankloss.losses import base_entries, check_base, combined
from rankloss_features.caching import Spec
from rankloss_trainers import create
from rankloss_trainers.catalog import choose
from rankloss_trainers.host import read_losses
from rankloss_trainers.option import OptionError
from rankloss_trainers.run_options import RunOptions
from rankloss_trainers.runtime import Runtime
from registered import register

ENCODERS = "image=efficientnet-lite0,text=minilm"
WITHOUT_COMMON_SPACE = {
    ENCODERS: "two encoders that have no common space",
    "text=minilm": "an encoder of one modality",
    "separate": "two encoders that have no common space",
}
"""Teachers without a common space, and the words by which an error describes them; the last is a folder."""


class Copying(nn.Module):
    """A loss of another package that copies a teacher's images."""

    def __init__(self, base: Any = None, *, gather: Any = None) -> None:
        super().__init__()
        self.base, self.components = check_base(base, gather), None

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        *,
        reference_image_features: Tensor,
        output_dict: bool = False,
        **inputs: Any,
    ) -> Any:
        target = reference_image_features
        if self.components is not None:
            target = target @ self.components.to(target)
        entries = base_entries(self.base, image_features, text_features, logit_scale, **inputs)
        return combined(entries, {"copy_loss": (image_features - target).square().sum()}, output_dict)


class Comparing(Copying):
    """A loss that needs a teacher's images and texts in one space, unless its option ``crossed`` is 0."""

    def __init__(self, base: Any = None, *, crossed: float = 1.0, gather: Any = None) -> None:
        super().__init__(base, gather=gather)
        del self.components
        self.crossed = crossed

    @property
    def needs_common_space(self) -> str:
        return "crossed" if self.crossed else ""


@pytest.fixture
def folders_of_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders in the working directory, named by the spaces of their features: ``separate``, ``common``."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    columns = {side: [f"{side} {i}" for i in range(taught.ROWS)] for side in ("image", "text")}
    columns_of_pairs = {"image_column": "image", "caption_column": "text"}
    data, features = datasets.Dataset.from_dict(columns), taught.teacher_features(width=8)
    taught.write_teacher_folder(tmp_path / "separate", data, features, **columns_of_pairs, spaces="separate")
    taught.write_teacher_folder(tmp_path / "common", data, features, **columns_of_pairs)


def runtime_of(loss: Any, teacher: str, **options: Any) -> Runtime:
    """The runtime of a loss by name with its options, or of a module, and of a teacher."""
    losses = choose(loss, options) if isinstance(loss, str) else read_losses(loss)
    return Runtime(HOST, losses, RunOptions(teacher=teacher))


@pytest.mark.usefixtures("folders_of_teachers")
@pytest.mark.parametrize("teacher", WITHOUT_COMMON_SPACE)
def test_a_copying_loss_of_another_package_is_refused_with_a_teacher_without_a_common_space(
    teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, copying=Copying)
    for loss, name in (("copying", "copying"), ("rankclip-in+copying", "copying"), (Copying(), "Copying")):
        with pytest.raises(ValueError, match=f"{name} cannot copy {WITHOUT_COMMON_SPACE[teacher]}"):
            runtime_of(loss, teacher)


def test_a_teacher_that_cannot_be_copied_is_refused_before_its_packages_are_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To install them would not help."""
    monkeypatch.setattr(Spec, "check", Mock(side_effect=ValueError("minilm is not installed")))
    with pytest.raises(ValueError, match="minilm is not installed"):
        runtime_of("rankclip-in", ENCODERS)
    with pytest.raises(ValueError, match="mimicry cannot copy two encoders"):
        runtime_of("mimicry", ENCODERS)


@pytest.mark.usefixtures("folders_of_teachers")
def test_a_created_copying_loss_is_refused_with_a_folder_without_a_common_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch, copying=Copying)
    with pytest.raises(ValueError, match=f"copying cannot copy {WITHOUT_COMMON_SPACE['separate']}"):
        create("copying", teacher="separate")


@pytest.mark.usefixtures("folders_of_teachers")
@pytest.mark.parametrize(
    ("name", "teacher", "options"),
    [
        pytest.param("copying", "common", {}, id="copying, common"),
        pytest.param("comparing", "common", {}, id="comparing, common"),
        pytest.param("comparing", "separate", {"crossed": 0.0}, id="comparing with crossed=0, separate"),
    ],
)
def test_a_loss_of_another_package_may_have_a_folder_that_has_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, name: str, teacher: str, options: dict[str, float]
) -> None:
    register(monkeypatch, copying=Copying, comparing=Comparing)
    assert runtime_of(name, teacher, **options).teaching.use == "required"


@pytest.mark.usefixtures("folders_of_teachers")
def test_a_loss_of_another_package_names_the_option_that_needs_a_common_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch, comparing=Comparing)
    message = f"crossed must be 0: this teacher is {WITHOUT_COMMON_SPACE['separate']}"
    # tiny: a loss of tests/tiny_package, registered for all tests
    for name in ("comparing", "rankclip-in+comparing", "comparing+tiny"):
        with pytest.raises(OptionError, match=message) as error:
            runtime_of(name, "separate")
        assert (error.value.key, error.value.loss) == ("crossed", "comparing")


@pytest.mark.usefixtures("folders_of_teachers")
def test_a_copying_loss_gets_the_components_of_a_wider_folder_in_a_run_and_in_a_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch, copying=Copying)
    inputs = {
        "image_features": unit(5, 4, seed=0, dtype=torch.float32),
        "text_features": unit(5, 4, seed=1, dtype=torch.float32),
        "reference_image_features": unit(5, 8, seed=2, dtype=torch.float32),
        "logit_scale": 5.0,
    }
    run, loop = runtime_of("copying", "common"), create("copying", teacher="common")
    entries = run(**inputs).terms
    assert run.criterion.components.shape == (8, 4)
    for loss in (loop, pickle.loads(pickle.dumps(loop)), copy.deepcopy(loop)):
        assert torch.equal(loss(**inputs, output_dict=True)["copy_loss"], entries["copy_loss"])
        assert torch.equal(loss.components, run.criterion.components)


def test_a_copying_loss_gets_zeros_beside_the_features_of_a_narrower_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch, copying=Copying)
    images = texts = unit(5, 4, seed=4, dtype=torch.float32)
    narrow = unit(5, 3, seed=3, dtype=torch.float32)
    loss = create("copying", teacher="given")
    copied = loss(images, texts, 5.0, reference_image_features=narrow, output_dict=True)["copy_loss"]
    expected = (images - torch.nn.functional.pad(narrow, (0, 1))).square().sum()  # a fourth column of zeros
    torch.testing.assert_close(copied, expected)
