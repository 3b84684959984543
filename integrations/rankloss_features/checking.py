"""The report of ``rankloss features --check`` on a folder."""

from __future__ import annotations

from rankloss_features.data import Data
from rankloss_features.folder import Features


def report(path: str, data: Data) -> str:
    """Compare a folder with data, read all of its rows and all pictures, and describe the folder.

    Where the teacher has read no pictures, none are read.

    Args:
        path: The folder.
        data: The pairs that it should be of.

    Raises:
        ValueError: It is not of these pairs, a picture has changed, or one of its files is damaged.
    """
    features = Features(path).check()
    about = features.about
    name_of_data = str(data.about["data"])
    features.compare(data.pairs(), name_of_data)
    if features.pictures is not None:
        features.compare_pictures(data.pictures(range(len(features))), name_of_data)
    teacher = ", ".join(f"{name} {value!r}" for name, value in about.get("teacher", {}).items())
    lines = [f"{path}: {len(features):,} rows of {name_of_data}, pair by pair", f"teacher: {teacher}"]
    if features.pictures is None:
        lines.append("pictures: by their names, since the teacher has read none")
    if about["skipped"]:
        lines.append(f"{about['skipped']:,} rows without features: their pictures cannot be read")
    lines += [f"{name}: {rows.dtype}, {rows.shape[1]} columns" for name, rows in features.arrays.items()]
    return "\n".join(lines)
