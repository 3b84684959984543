"""A teacher's features of a training's pairs, computed once: ``rankloss features``.

The command writes a folder (:mod:`rankloss_features.folder`) that knows of which pairs its rows are. The
trainers read it, and refuse pairs that are not those of the rows.
"""

from __future__ import annotations

from rankloss_features.binding import bind
from rankloss_features.components import Components
from rankloss_features.folder import Features

__all__ = ["Components", "Features", "bind"]
