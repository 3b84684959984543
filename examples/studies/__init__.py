"""The studies: each is a folder with its plan, its settings, its records and its report."""

STUDIES = {"alignment": "studies.alignment.study"}
"""Modules of the living studies by name; each has the function ``study(name)``."""
