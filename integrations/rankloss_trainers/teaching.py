"""A run's teacher: the one that is named, its use by the loss, and its features in a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankloss.losses import TEACHER, takes_teacher
from rankloss_features.folder import Features
from rankloss_trainers.composing import arguments_of
from rankloss_trainers.declared import Loss
from rankloss_trainers.host import Host
from rankloss_trainers.option import OptionError, did_you_mean
from rankloss_trainers.run_options import GIVEN, RunOptions, Teacher


class Teaching:
    """The teacher of a run.

    Two attributes of a loss's parts tell whether a teacher without a common space, of two encoders or of one,
    can teach them (docs/writing.md):

    - ``components``: the part compares features with the teacher's own, which it copies.
    - ``needs_common_space``: the option by which it compares the teacher's images with its texts.

    Args:
        host: The trainer.
        name: The name of the loss.
        losses: The losses with their options.
        criterion: Their module.
        options: The options of the run.

    Attributes:
        teacher: The teacher that the run names, or None.
        use: ``"required"`` if the run or a loss names a teacher, a loss declares that it needs one, or its
            ``forward`` has no default for the teacher's features; else ``"optional"`` if it takes them, or
            ``"none"``.
        features: The folder of the teacher's features, or None while there is none.
        data_columns: The columns of the training data, where a host names them (:meth:`name_columns`).

    Raises:
        OptionError: No teacher has this name, or the loss uses none.
        ValueError: A loss copies a teacher without a common space.
    """

    def __init__(
        self, host: Host, name: str, losses: Sequence[Loss], criterion: nn.Module, options: RunOptions
    ) -> None:
        self.name = name
        self.teacher = _named_teacher(host, name, losses, options.teacher)
        self.features: Features | None = None
        self.data_columns: Collection[str] = ()
        self._host, self._losses = host, losses
        parts = [*criterion.modules()]
        self._copying: list[Any] = [part for part in parts if hasattr(part, "components")]
        self._copying_loss = _loss_of(self._copying, losses) or name
        self._comparing = _comparing_option(parts, losses)
        # Before the host or look_up refuses this teacher: to serve or to install it would not help.
        if self.teacher is not None and self.teacher.are_encoders:
            self._check_copies()
        self.use = _use(name, losses, criterion, options.teacher)

    @property
    def spec(self) -> Any:
        """The teacher to compute, of :class:`rankloss_features.caching.Spec`; or None."""
        return None if self.teacher is None else self.teacher.spec

    # --- the named teacher ---

    def look_up(self) -> None:
        """Look the named teacher up, and open its folder.

        Raises:
            OptionError: There is no such teacher, or it has no common space that the loss needs.
        """
        if self.teacher is None:
            return
        self.teacher.check()
        if self.teacher.are_encoders:
            self._check_spaces()
        if self.teacher.folder is not None:
            self.open_folder(self.teacher.folder)

    def open_folder(self, folder: str) -> None:
        """Take the features of a folder for the teacher's.

        Raises:
            OptionError: It is no complete folder of features, or its encoders have no common space that the
                loss needs.
        """
        try:
            self.features = Features(folder).check()
        except (OSError, ValueError) as error:
            raise OptionError("teacher", str(error)) from error
        if not self.features.common_space:
            self._check_spaces()

    def _check_spaces(self) -> None:
        """Raise a ValueError if the loss needs the common space that the teacher has not."""
        self._check_copies()
        if self._comparing is not None:
            option, loss = self._comparing
            text = f"must be 0: this teacher is {self._encoders}, so it can rank only in-modal lists, as "
            raise OptionError(option, f"{text}rankclip-in does{self._alignment}", loss)

    def _check_copies(self) -> None:
        """Raise a ValueError if the loss copies the teacher, which has no common space."""
        if self._copying:
            raise ValueError(f"{self._copying_loss} cannot copy {self._encoders}{self._alignment}")

    @property
    def _is_one_encoder(self) -> bool:
        """True for a teacher of images or texts alone."""
        return self.teacher is not None and self.teacher.is_one_encoder

    @property
    def _encoders(self) -> str:
        """A teacher without a common space, in words."""
        if self._is_one_encoder:
            return "an encoder of one modality"
        return "two encoders that have no common space"

    @property
    def _alignment(self) -> str:
        """The way to give two encoders a common space, as the end of a sentence."""
        return "" if self._is_one_encoder else "; image=A,text=B,align or features --align gives them one"

    # --- the data ---

    def name_columns(self, columns: Collection[str]) -> None:
        """The columns of a training's data, see :attr:`data_columns`.

        Raises:
            ValueError: A teacher's column is misspelt, and the loss would train without it.
        """
        self.data_columns = columns
        if self.use != "optional":  # a loss that needs a teacher misses the misspelt column itself
            return
        for column in columns:
            hint = did_you_mean(column, TEACHER, cutoff=0.8)
            if hint and column not in TEACHER:
                raise ValueError(f"the data have {column}, which {self.name} does not use{hint}")

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Check and return the teacher's features of a batch, by their names.

        The first features also give the parts that copy them their matrix, ``components``.

        Raises:
            ValueError: There are none and the loss needs them, or it does not use them; or one of the two is
                not there, and a column of the data is called nearly so or is not in the batch.
        """
        features = {name: batch[name] for name in TEACHER if batch.get(name) is not None}
        self._check_use(features)
        if features and self._copying:
            self._set_components(batch.get("image_features"), next(iter(features.values())))
        return features

    def _check_use(self, features: Collection[str]) -> None:
        """Raise a ValueError unless a teacher's features are there just where the loss uses them."""
        if features and self.use == "none":
            raise ValueError(f"the data have {', '.join(features)}, but {self.name} does not use a teacher")
        not_in_batch = [column for column in self.data_columns if column not in features]
        # One of the two features may do, unless the data have the other under a misspelt name.
        has_misspelt_name = any(column.startswith("reference_") for column in not_in_batch)
        is_incomplete = not features or (len(features) < len(TEACHER) and has_misspelt_name)
        if self.use == "required" and is_incomplete:
            columns = f"; the data have {', '.join(self.data_columns)}" if self.data_columns else ""
            raise ValueError(f"{self.name} needs a teacher's features: {self._remedy()}{columns}")
        dropped = [column for column in not_in_batch if column in TEACHER]
        if self.use == "optional" and dropped:
            raise ValueError(
                f"the data have {dropped[0]}, and the batch has not: let its collator pass it on"
            )

    def _remedy(self) -> str:
        """The way to give a teacher's features, with the command that computes those of a loss's own."""
        ways = self._host.teacher
        own_teachers = _own_teachers(self._losses)
        if not own_teachers:
            return ways
        with_command: str = Teacher(own_teachers[0]).spec.two_steps(ways)
        return with_command

    def _set_components(self, student: Any, teacher: Any) -> None:
        """Give the matrix that brings the teacher to the student's width to the parts that copy it.

        Of a wider teacher these are the folder's principal components; of a narrower one it adds zeros.
        """
        parts = [part for part in self._copying if part.components is None]
        are_matrices = all(
            isinstance(features, Tensor) and features.dim() == 2 for features in (student, teacher)
        )
        if not parts or not are_matrices:  # all have one already; or the loss itself names the wrong inputs
            return
        student_width, teacher_width = student.shape[1], teacher.shape[1]
        if student_width > teacher_width:
            matrix = torch.eye(teacher_width, student_width)
        elif student_width < teacher_width and self.features is not None:
            matrix = self.features.components(student_width).matrix
        else:  # nothing is to be done, or nothing can be: the loss then names both widths
            return
        for part in parts:
            part.components = matrix


def _named_teacher(host: Host, name: str, losses: Sequence[Loss], option: str | None) -> Teacher | None:
    """The teacher of the run's option, else the one that a loss has where the trainer computes it."""
    if option is not None:
        return None if option == GIVEN else Teacher(option)
    if "teacher" not in host.serves:
        return None
    names = _own_teachers(losses)
    if len(names) > 1:
        raise ValueError(f"{name} has two teachers, {' and '.join(names)}: name one")
    return Teacher(names[0]) if names else None


def _own_teachers(losses: Sequence[Loss]) -> list[str]:
    """The teachers that losses have where a run names none."""
    declared = {loss.named.teacher for loss in losses if loss.named.teacher is not None}
    return sorted(declared - {"required"})


def _use(name: str, losses: Sequence[Loss], criterion: nn.Module, option: str | None) -> str:
    """The use of a teacher, see :attr:`Teaching.use`."""
    takes = takes_teacher(criterion)
    if option is not None and not takes:
        raise OptionError("teacher", f"{name} does not use a teacher; got {option}")
    is_declared = any(loss.named.teacher is not None for loss in losses)
    has_no_default = any(argument.default is argument.empty for argument in arguments_of(criterion, *TEACHER))
    if option is not None or is_declared or has_no_default:
        return "required"
    return "optional" if takes else "none"


def _comparing_option(parts: Sequence[nn.Module], losses: Sequence[Loss]) -> tuple[str, str] | None:
    """The option by which a part compares a teacher's images with its texts, and the name of its loss.

    Those of the first such part, or None; the name is empty where a function built the part.
    """
    for part in parts:
        option = getattr(part, "needs_common_space", None)
        if option:
            return option, _loss_of([part], losses) or ""
    return None


def _loss_of(parts: Sequence[nn.Module], losses: Sequence[Loss]) -> str | None:
    """The name of the first loss of whose class one of the parts is; None where a function built them."""
    classes = {type(part) for part in parts}
    return next((loss.name for loss in losses if loss.named.constructor in classes), None)
