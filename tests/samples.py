"""Samples of webdatasets."""

from __future__ import annotations

import io
import tarfile


def add_sample(shard: tarfile.TarFile, key: str, **members: bytes) -> None:
    """Write a sample, its members by their extensions."""
    for extension, content in members.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        shard.addfile(member, io.BytesIO(content))
