"""The studies: each is a folder with its plan, its trainings, its records and its report."""

STUDIES = {
    "lists": "studies.lists.study",
    "finetuning": "studies.finetuning.study",
    "photographs-1": "studies.photographs.part1",
    "photographs-2a": "studies.photographs.part2a",
    "photographs-2b": "studies.photographs.taught",
    "photographs-2c": "studies.photographs.part2c",
    "photographs-2d": "studies.photographs.part2d",
    "photographs-2e": "studies.photographs.part2e",
    "photographs-3": "studies.photographs.taught",
    "ids": "studies.ids.study",
    "references": "studies.references.study",
    "miniature": "studies.miniature.exhibits",
    "miniature-search": "studies.miniature.ladder",
    "miniature-question": "studies.miniature.ladder",
    "miniature-teacher": "studies.miniature.ladder",
    "miniature-distil": "studies.miniature.ladder",
}
"""Modules by the studies' names; each has the function ``study(name)``."""
