"""The folder of orders: for each picture of the data a list of others, with a grade for each.

::

    orders.json    the data, the numbers of rows, pictures and lists, a hash of each array
    pairs.npy      [rows], uint64: the hash of each row's caption and image name
    pictures.npy   [rows], int64: the number of each row's picture
    listed.npy     [pictures, K], int64: the listed pictures' numbers; −1 behind the end of a shorter list
    grades.npy     [pictures, K], float32: the place of each grade among those of its list, from 1 for the
                   smallest; −∞ stays −∞
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rankloss_features.data import Data, Table
from rankloss_features.folder import Array, Rows, hash_of, hashes_of_pairs, name_of
from rankloss_trainers.lists import graded

_ABOUT = "orders.json"
_KEYS = {"id", "ids", "grades"}
_UNLISTED = -1

ARGUMENTS = ("order_pictures", "order_listed", "order_grades")
"""The orders of each pair, by the names of a loss's arguments and of columns of data."""


class Orders(Rows):
    """A folder of ``rankloss orders``.

    Args:
        path: The folder.

    Attributes:
        about: The entries of ``orders.json``.
        pairs: The hash of each row's pair.

    Raises:
        ValueError: It is no such folder, or a file is not as ``orders.json`` says.
    """

    def __init__(self, path: str) -> None:
        self.path, file = path, Path(path, _ABOUT)
        try:
            self.about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            rows, pictures, longest = (self.about[x] for x in ("rows", "pictures", "longest"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no folder of `rankloss orders`: {error}") from error
        self.pairs = self._array("pairs", "uint64", (rows,))
        self.pictures = self._array("pictures", "int64", (rows,))
        self.listed = self._array("listed", "int64", (pictures, longest))
        self.grades = self._array("grades", "float32", (pictures, longest))

    def check(self) -> Orders:
        """Read the files once; the same folder.

        Raises:
            ValueError: A file is not as it was written.
        """
        for name, written in self.about["hashes"].items():
            if hash_of(getattr(self, name)).hex() != written:
                raise ValueError(f"{self.path}/{name}.npy is not as it was written")
        return self

    def check_bound(self, pictures: Any, listed: Any, grades: Any) -> None:
        """Raise a ValueError unless the orders of a batch are of this folder."""
        pictures, listed, grades = map(np.asarray, (pictures, listed, grades))
        own = pictures.clip(0, len(self.listed) - 1)
        found = zip((pictures, listed, grades), (own, self.listed[own], self.grades[own]), strict=True)
        if not all(np.array_equal(x, y) for x, y in found):
            bind = f"rankloss_trainers.orders.bind(dataset, {self.path!r})"
            raise ValueError(f"the data do not have the lists of {self.path}, which {bind} adds")

    def take(self, rows: Array) -> dict[str, Array]:
        """The orders of some rows, by the names that the loss has for them."""
        pictures = self.pictures[rows]
        return dict(zip(ARGUMENTS, (pictures, self.listed[pictures], self.grades[pictures]), strict=True))


def bind(dataset: Any, folder: str, *, image_column: str = "image", caption_column: str = "caption") -> Any:
    """A ``datasets.Dataset`` with the columns :data:`ARGUMENTS`, once every pair is compared with the folder.

    Args:
        dataset: The pairs, in the order in which ``rankloss orders`` read them.
        folder: The folder.
        image_column: The images, or their paths.
        caption_column: The captions.

    Raises:
        ValueError: A row has another pair than the folder's, or is missing.
    """
    orders = Orders(folder).check()
    orders.compare(Table(dataset, image_column, caption_column).pairs(), "the data")
    for name, column in orders.take(np.arange(len(orders))).items():
        dataset = dataset.add_column(name, list(column))
    return dataset


def write(output: Path, data: Data, file: Path, command: str) -> dict[str, Any]:
    """Write the folder, and return the entries of ``orders.json``.

    Args:
        output: The folder, which must not exist, or be of this command.
        data: The pairs.
        file: The lists, see :func:`read`.
        command: The command line, for ``orders.json``.

    Raises:
        ValueError: The folder has other files; the data have no pairs, or two pictures of one name; or a list
            is wrong: the error names its line.
    """
    if output.exists() and not (output / _ABOUT).is_file() and any(output.iterdir()):
        raise ValueError(f"--output {output} has files and no {_ABOUT}: it is not of this command")
    captions, names = _pairs(data)
    number = {name: n for n, name in enumerate(dict.fromkeys(names))}
    lists: dict[int, list[tuple[int, float]]] = {}
    for where, query, candidates, grades in read(file):
        row = _number(query, number, where)
        if row in lists:
            raise ValueError(f"{query!r} has two lists; the second in {where}")
        found = [(_number(x, number, where), g) for x, g in graded(candidates, grades, where)]
        listed = [x for x, _ in found]
        if row in listed or len(set(listed)) < len(listed):
            twice = query if row in listed else next(x for x in candidates if candidates.count(x) > 1)
            raise ValueError(f"ids must be distinct, and not the list's own; got {twice!r} in {where}")
        lists[row] = found
    if not lists:
        raise ValueError(f"--from {file} has no list")
    longest = max(map(len, lists.values()))
    listed_array = np.full((len(number), longest), _UNLISTED, np.int64)
    grade_array = np.zeros((len(number), longest), np.float32)
    for row, found in lists.items():
        # Only their order counts, which float32 would not keep of all numbers.
        places = {grade: place for place, grade in enumerate(sorted({g for _, g in found} - {-math.inf}), 1)}
        listed_array[row, : len(found)] = [x for x, _ in found]
        grade_array[row, : len(found)] = [places.get(g, g) for _, g in found]
    arrays = {
        "pairs": hashes_of_pairs(captions, names),
        "pictures": np.array([number[name] for name in names], np.int64),
        "listed": listed_array,
        "grades": grade_array,
    }
    about = {
        **{"rows": len(names), "pictures": len(number), "lists": len(lists), "longest": longest},
        **{"data": data.about, "command": command},
        "hashes": {name: hash_of(array).hex() for name, array in arrays.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    # The hashes first: without all of the arrays that belong to them the folder is refused.
    (output / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for name, array in arrays.items():
        np.save(output / f"{name}.npy", array)
    return about


def read(file: Path) -> Iterator[tuple[str, Any, Any, Any]]:
    """The lists of a file: the place, the query's id, the ids, and their grades.

    The file is JSON lines, ``{"id": "a.jpg", "ids": ["c.jpg", "b.jpg"], "grades": [2, 1]}``, or Parquet with
    these columns. Without grades the ids are in order, the best first.

    Raises:
        ValueError: The file cannot be read, or a line has another form.
    """
    for where, entry in _entries(file):
        if not isinstance(entry, dict) or not {"id", "ids"} <= entry.keys() <= _KEYS:
            raise ValueError(f"a list must have id, ids and perhaps grades; got {entry!r:.80} in {where}")
        ids, grades = entry["ids"], entry.get("grades")
        if not isinstance(ids, list) or not ids:
            raise ValueError(f"ids must be a list with at least one id; got {ids!r:.80} in {where}")
        yield where, entry["id"], ids, list(range(len(ids), 0, -1)) if grades is None else grades


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    where = str(file)
    try:
        if file.suffix == ".parquet":
            from pyarrow import parquet  # type: ignore[import-untyped]

            for number, entry in enumerate(parquet.read_table(file).to_pylist(), 1):
                yield f"row {number} of {file}", entry
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                where = f"line {number} of {file}"
                yield where, json.loads(line)
    except ValueError as error:  # as Arrow's are
        raise ValueError(f"{where} cannot be read: {error}") from error


def _pairs(data: Data) -> tuple[list[str], list[str]]:
    """All captions and image names.

    Raises:
        ValueError: There are none, or two pictures have one name.
    """
    blocks = list(data.pairs())
    captions, names = ([x for block in blocks for x in block[side]] for side in (0, 1))
    if not names:
        raise ValueError(f"--data {data.about['data']} has no pairs of a picture and a caption")
    # Each sample of a webdataset has a picture of its own.
    paths = data.names["image.path"] if isinstance(data, Table) else range(len(names))
    seen: dict[str, Any] = {}
    for row, (name, path) in enumerate(zip(names, paths, strict=True)):
        if seen.setdefault(name, path) != path:
            raise ValueError(
                f"--data has two pictures {name!r}, of which ids name one; the second in row {row}"
            )
    return captions, names


def _number(name: Any, number: dict[str, int], where: str) -> int:
    found = number.get(name, number.get(name_of(name))) if isinstance(name, str) else None
    if found is None:
        example = next(iter(number))
        raise ValueError(f"the data have no picture {name!r}, as {example!r} is one; it is in {where}")
    return found
