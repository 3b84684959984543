"""Lists of graded captions beside each picture, as open_clip's trainer reads them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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


class _Fields(NamedTuple):
    """The integers of a batch's lists, apart; :meth:`Candidates._encoded` writes them, list by list.

    A list has P places, of which the first may be the own caption's and some at the end may be unused.

    Attributes:
        mask: ``[B, P]``, true for the places in use, which come first.
        picture_ids: ``[B]``, the id of the picture.
        own_ids: ``[B]``, the id of the picture's own caption.
        caption_ids: ``[B, P]``, an id of each place's text.
        grade_bits: ``[B, P]``, the bits of each place's grade.
        tokens: ``[B, ≥ candidates · context]``, the tokens of each candidate, but not of the own caption,
            which the batch has already; zeros follow where other columns are wider.
    """

    mask: Tensor
    picture_ids: Tensor
    own_ids: Tensor
    caption_ids: Tensor
    grade_bits: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, encoded: Tensor, places: int) -> _Fields:
        """Take rows of integers apart, for lists of so many places."""
        used, picture_ids, own_ids = encoded[:, :3].unbind(1)
        caption_ids, grade_bits, tokens = encoded[:, 3:].tensor_split([places, 2 * places], dim=1)
        mask = torch.arange(places, device=encoded.device) < used[:, None]
        return cls(mask, picture_ids, own_ids, caption_ids, grade_bits, tokens)


class Candidates:
    """A list of graded captions, whose features join the model's output as arguments of ``RankedLists``.

    A :class:`rankloss_open_clip.columns.text_columns.TextColumn` of the picture's own caption. The model
    encodes the own captions and all candidates of a batch in one call.

    Args:
        own_caption: The place of a picture's own caption in its list: apart from it, or at the top, above all
            graded candidates; to grade it, name it among the candidates.
        max_candidates: Places of a list, which a webdataset has to be told; a longer list is an error. None:
            the longest list of a CSV file.
    """

    need = "lists"  # of rankloss_trainers.host.NEEDS

    def __init__(
        self, *, own_caption: Literal["apart", "top"] = "apart", max_candidates: int | None = None
    ) -> None:
        check_choice("own_caption", own_caption, ("apart", "top"))
        if max_candidates is not None:
            check_count("max_candidates", max_candidates)
        self.own_places = 1 if own_caption == "top" else 0  # of each list, for the picture's own caption
        self.max_candidates: Any = max_candidates
        self.name = f"list of {CANDIDATES} and {GRADES}"

    # --- reading ---

    def read_rows(self, path: str, separator: str, dataset: Any) -> list[str]:
        """The list of each row of a CSV file, from two columns, as text for :meth:`encode`.

        Raises:
            ValueError: The file lacks one, or a row's list is wrong:
                :func:`rankloss_trainers.graded.lists.check_list`.
        """
        columns = read_columns(path, separator, CANDIDATES, GRADES)
        rows = zip(dataset.images, dataset.captions, *columns, strict=True)
        ids_of_rows, lists = [], []
        for number, (image, caption, candidates, grades) in enumerate(rows, start=1):
            picture_id = hash_identity(os.path.normpath(str(image)))
            ids_of_rows.append((picture_id, hash_identity(str(caption))))
            lists.append(self._read_list(caption, candidates, grades, f"row {number} of {path}"))
        if not any(has_order(grades) for _, grades in lists):
            warn_of_ties(path)
        if self.max_candidates is None:
            self.max_candidates = max(len(captions) for captions, _ in lists) - self.own_places
        return [
            json.dumps([picture_id, own_id, captions, grades])
            for (picture_id, own_id), (captions, grades) in zip(ids_of_rows, lists, strict=True)
        ]

    def read_sample(self, sample: dict[str, Any], caption: str, image: bytes) -> str:
        """The list of a webdataset sample, from two members, which are taken out of it, as text.

        A picture has the id of its content: equal pictures are one, whatever the keys of their samples.

        Raises:
            ValueError: The sample lacks a member, its list is wrong, or ``max_candidates`` is None.
        """
        where = named_sample(sample)
        for member in (f"{CANDIDATES}.json", f"{GRADES}.json"):
            if member not in sample:
                raise ValueError(f"{where} has no {member}; every picture needs a list of candidates")
        if self.max_candidates is None:
            raise ValueError(
                "a webdataset needs the length of its longest list: --ranked-lists-max-candidates"
            )
        candidates = sample.pop(f"{CANDIDATES}.json")
        grades = sample.pop(f"{GRADES}.json")
        captions, values = self._read_list(caption, candidates, grades, where)
        picture_id, own_id = hash_identity(identity_of(image)), hash_identity(caption)
        return json.dumps([picture_id, own_id, captions, values])

    def _read_list(
        self, caption: Any, candidates: Any, grades: Any, where: str
    ) -> tuple[list[str], list[float]]:
        """The texts of a list, with the own caption where it has a place, and their grades.

        Args:
            caption: The own caption.
            candidates: The list as JSON.
            grades: As many numbers, as JSON.
            where: The place of the list in the data, for the errors.

        Raises:
            ValueError: The list is wrong or too long; or the own caption has a place of its own, and is among
                the candidates, too, or cannot have a finite grade above theirs.
        """
        graded = check_list(_parsed(candidates, where), _parsed(grades, where), where)
        captions = [candidate for candidate, _ in graded]
        values = [grade for _, grade in graded]
        if self.max_candidates is not None and len(captions) > self.max_candidates:
            raise ValueError(
                f"{where} has {len(captions)} candidates, more than --ranked-lists-max-candidates "
                f"{self.max_candidates}"
            )
        for candidate in captions:
            if not isinstance(candidate, str):
                raise ValueError(f"candidates must be texts; got {candidate!r} in {where}")
        if not self.own_places:
            return captions, values
        if str(caption) in captions:
            raise ValueError(
                f"the own caption {caption!r:.60} cannot be above all candidates and among them, in {where}"
            )
        top = 2 * max(0.0, *values) + 1  # above all: doubled, as adding 1 leaves a large number as it is
        if math.isinf(top):
            raise ValueError(
                "grades must be below 2**1023, so that twice the highest, the own caption's grade, is "
                f"finite; got {max(values)} in {where}"
            )
        return [str(caption), *captions], [top, *values]

    # --- tokenizing ---

    def encode(self, tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:
        """A row of integers for each list."""
        rows = []
        for text in texts:
            picture_id, own_id, captions, grades = json.loads(text)
            rows.append(self._encoded(tokenize, picture_id, own_id, captions, grades))
        return torch.stack(rows)

    def _encoded(
        self,
        tokenize: Callable[[list[str]], Tensor],
        picture_id: int,
        own_id: int,
        captions: list[str],
        grades: list[float],
    ) -> Tensor:
        """The integers of one list, in the order of :class:`_Fields`."""
        used = len(captions)
        unused = self._places - used  # places at the end, of zeros
        of_list = torch.tensor([used, picture_id, own_id])
        caption_ids = torch.tensor([hash_identity(caption) for caption in captions])
        grade_bits = encode_grades(torch.tensor(grades, dtype=torch.float64))
        tokens = tokenize(captions[self.own_places :])
        of_places = [
            F.pad(caption_ids, (0, unused)),
            F.pad(grade_bits, (0, unused)),
            F.pad(tokens, (0, 0, 0, unused)).flatten(),
        ]
        return torch.cat([of_list, *of_places])

    @property
    def _places(self) -> int:
        """The places of a list, with the own caption's."""
        return int(self.max_candidates + self.own_places)

    # --- the model ---

    def inputs(self, texts: Tensor, encoded: Tensor) -> Tensor:
        """The tokens of the texts, then of the candidates of all lists, padding left out."""
        fields = _Fields.of(encoded, self._places)
        has_candidate = fields.mask[:, self.own_places :]  # [B, candidates]
        candidates, context = has_candidate.shape[1], texts.shape[1]
        flat_tokens = fields.tokens[:, : candidates * context]
        tokens = flat_tokens.unflatten(1, (candidates, context))
        return torch.cat([texts, tokens[has_candidate]])

    def outputs(self, output: dict[str, Any], encoded: Tensor) -> dict[str, Any]:
        """The output and the lists, by the names that the loss has for them."""
        fields = _Fields.of(encoded, self._places)
        has_candidate = fields.mask[:, self.own_places :]
        own_texts = len(output["text_features"]) - int(has_candidate.sum())  # the candidates follow them
        texts, candidates = output["text_features"][:own_texts], output["text_features"][own_texts:]
        padded = candidates.new_zeros(*has_candidate.shape, candidates.shape[-1])
        padded = padded.masked_scatter(has_candidate[..., None], candidates)
        if self.own_places:
            own_captions = texts[: len(encoded), None]
            padded = torch.cat([own_captions, padded], dim=1)
        return {
            **output,
            "text_features": texts,
            "query_features": output["image_features"],
            "candidate_features": padded,
            "query_ids": fields.picture_ids,
            "excluded_ids": fields.own_ids,
            "candidate_ids": fields.caption_ids,
            "grades": decode_grades(fields.grade_bits),
            "mask": fields.mask,
        }


def _parsed(cell: Any, where: str) -> Any:
    """The content of a cell or a member, which should be a list.

    Raises:
        ValueError: It is no JSON.
    """
    try:
        return json.loads(cell)
    except (TypeError, ValueError) as error:
        raise ValueError(f"candidates and grades must be JSON lists; got {cell!r:.60} in {where}") from error
