"""The studies: each is a folder with its plan, its settings, its records and its report."""

STUDIES = {
    "alignment": "studies.alignment.study",
    "baselines": "studies.baselines.study",
    "captions": "studies.captions.study",
    "dropout": "studies.dropout.study",
    "heads": "studies.heads.study",
    "spread": "studies.spread.study",
    "towers": "studies.towers.study",
}
"""Modules of the living studies by name; each has the function ``study(name)``."""
