"""Lists of graded captions beside each picture, as open_clip's trainer reads them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.options import check_choice, check_count
from rankloss_features.data import named_sample
from rankloss_features.folder import identity_of
from rankloss_open_clip.columns.csv_files import read_columns
from rankloss_trainers.graded.lists import (
    check_list,
    decode_grades,
    encode_grades,
    has_order,
    hash_identity,
    warn_of_ties,
)

CANDIDATES, GRADES = "candidates", "grades"
"""The columns of a CSV file, each cell a JSON list; with ``.json`` the members of a webdataset sample."""

_HEAD = 3  # numbers of a row before those of its places


class Candidates:
    """A list of graded captions, whose features join the model's output as arguments of ``RankedLists``.

    A :class:`rankloss_open_clip.columns.text_columns.TextColumn` of the picture's own caption. The model
    encodes the own captions and all candidates of a batch in one call. In each row of integers are the number
    of places in use, ids of the picture and of its own caption, and for each place an id of its text, the
    bits of its grade, and its tokens.

    Args:
        own_caption: The place of a picture's own caption in its list: apart from it, or at the top, above all
            graded candidates; to grade it, name it among the candidates.
        max_candidates: Places of a list, which a webdataset has to be told; a longer list is an error. None:
            the longest list of a CSV file.
    """

    need = "lists"

    def __init__(
        self, *, own_caption: Literal["apart", "top"] = "apart", max_candidates: int | None = None
    ) -> None:
        check_choice("own_caption", own_caption, ("apart", "top"))
        if max_candidates is not None:
            check_count("max_candidates", max_candidates)
        self.own = int(own_caption == "top")
        self.max_candidates: Any = max_candidates
        self.name = f"list of {CANDIDATES} and {GRADES}"

    # --- reading ---

    def read_rows(self, path: str, separator: str, dataset: Any) -> list[str]:
        """The two columns of a CSV file.

        Raises:
            ValueError: The file lacks one, or a row's list is wrong:
                :func:`rankloss_trainers.graded.lists.check_list`.
        """
        columns = read_columns(path, separator, CANDIDATES, GRADES)
        rows = zip(dataset.images, dataset.captions, *columns, strict=True)
        ids, lists = [], []
        for number, (image, caption, candidates, grades) in enumerate(rows, start=1):
            ids.append([hash_identity(os.path.normpath(str(image))), hash_identity(str(caption))])
            lists.append(self._list(caption, candidates, grades, f"row {number} of {path}"))
        if not any(has_order(grades) for _, grades in lists):
            warn_of_ties(path)
        if self.max_candidates is None:
            self.max_candidates = max(len(captions) for captions, _ in lists) - self.own
        return [
            json.dumps([*of_row, captions, grades])
            for of_row, (captions, grades) in zip(ids, lists, strict=True)
        ]

    def read_sample(self, sample: dict[str, Any], caption: str, image: bytes) -> str:
        """The two members of a webdataset sample, which are taken out of it; its picture is its content.

        Raises:
            ValueError: The sample lacks one, or its list is wrong.
        """
        where = named_sample(sample)
        members = [f"{name}.json" for name in (CANDIDATES, GRADES)]
        missing = [name for name in members if name not in sample]
        if missing:
            raise ValueError(f"{where} has no {missing[0]}; every picture needs a list of candidates")
        if self.max_candidates is None:
            raise ValueError(
                "a webdataset needs the length of its longest list: --ranked-lists-max-candidates"
            )
        candidates, grades = (sample.pop(name) for name in members)
        of_pair = [hash_identity(identity_of(image)), hash_identity(caption)]
        return json.dumps([*of_pair, *self._list(caption, candidates, grades, where)])

    def _list(self, caption: Any, candidates: Any, grades: Any, where: str) -> tuple[list[str], list[float]]:
        """The texts of a list, with the own caption where it has a place, and their grades."""
        captions, values = zip(
            *check_list(_parsed(candidates, where), _parsed(grades, where), where), strict=True
        )
        if self.max_candidates is not None and len(captions) > self.max_candidates:
            raise ValueError(
                f"{where} has {len(captions)} candidates, more than --ranked-lists-max-candidates "
                f"{self.max_candidates}"
            )
        wrong = [x for x in captions if not isinstance(x, str)]
        if wrong:
            raise ValueError(f"candidates must be texts; got {wrong[0]!r} in {where}")
        if not self.own:
            return list(captions), list(values)
        if str(caption) in captions:
            raise ValueError(
                f"the own caption {caption!r:.60} cannot be above all candidates and among them, in {where}"
            )
        top = 2 * max(0.0, *values) + 1  # above all: 1 adds nothing to large numbers
        if math.isinf(top):
            raise ValueError(f"no finite grade for the own caption is above {max(values)}, in {where}")
        return [str(caption), *captions], [top, *values]

    # --- tokenizing ---

    def encode(self, tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:
        """A row of integers for each list."""
        return torch.stack([self._encoded(tokenize, *json.loads(text)) for text in texts])

    def _encoded(
        self,
        tokenize: Callable[[list[str]], Tensor],
        picture: int,
        own: int,
        captions: list[str],
        grades: list[float],
    ) -> Tensor:
        used = len(captions)
        free = self._places - used
        ids = torch.tensor([hash_identity(caption) for caption in captions])
        bits = encode_grades(torch.tensor(grades, dtype=torch.float64))
        tokens = tokenize(captions[self.own :])
        parts = F.pad(ids, (0, free)), F.pad(bits, (0, free)), F.pad(tokens, (0, 0, 0, free)).flatten()
        return torch.cat([torch.tensor([used, picture, own]), *parts])

    @property
    def _places(self) -> int:
        return int(self.max_candidates + self.own)

    # --- the model ---

    def inputs(self, texts: Tensor, encoded: Tensor) -> Tensor:
        """The texts, then the candidates of all lists, padding left out."""
        is_used = self._is_used(encoded)[:, self.own :]
        tokens = encoded[:, _HEAD + 2 * self._places :][:, : is_used.shape[1] * texts.shape[1]]
        return torch.cat([texts, tokens.unflatten(1, (-1, texts.shape[1]))[is_used]])

    def outputs(self, output: dict[str, Any], encoded: Tensor) -> dict[str, Any]:
        """The output and the lists, by the names that the loss has for them."""
        places, mask = self._places, self._is_used(encoded)
        is_used = mask[:, self.own :]
        first = len(output["text_features"]) - int(is_used.sum())
        texts, candidates = output["text_features"][:first], output["text_features"][first:]
        features = candidates.new_zeros(*is_used.shape, candidates.shape[-1])
        features = features.masked_scatter(is_used[..., None], candidates)
        if self.own:
            features = torch.cat([texts[: len(encoded), None], features], dim=1)
        return {
            **output,
            "text_features": texts,
            "query_features": output["image_features"],
            "candidate_features": features,
            "query_ids": encoded[:, 1],
            "excluded_ids": encoded[:, 2],
            "candidate_ids": encoded[:, _HEAD : _HEAD + places],
            "grades": decode_grades(encoded[:, _HEAD + places : _HEAD + 2 * places]),
            "mask": mask,
        }

    def _is_used(self, encoded: Tensor) -> Tensor:
        return torch.arange(self._places, device=encoded.device) < encoded[:, :1]


def _parsed(cell: Any, where: str) -> Any:
    """The list in a cell or a member."""
    try:
        return json.loads(cell)
    except (TypeError, ValueError) as error:
        raise ValueError(f"candidates and grades must be JSON lists; got {cell!r:.60} in {where}") from error
