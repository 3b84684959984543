"""How operators are registered with torch: a compiler takes each as one, without looking inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What each operator runs, by its name, for tools that count what happens inside it."""

# By torch's lower-level interface, since the first use of torch.library.custom_op imports the compiler.
_LIBRARY = torch.library.Library("rankloss", "FRAGMENT")


def register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``torch.ops.rankloss.NAME``, with what it gives for tensors without data."""
    IMPLEMENTATIONS[name] = run
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rankloss::{name}", fake, lib=_LIBRARY)
