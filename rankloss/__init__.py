"""Ranking-consistency losses for CLIP training."""

from rankloss._version import __version__ as __version__
