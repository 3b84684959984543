"""Sentences that both forms of the report have: what is in a cell, and what the figures show."""

from __future__ import annotations

from . import statistics
from .tables import MARKS

_CONFIDENCE = f"{100 * statistics.CONFIDENCE:.0f} %"
_POINTS = (
    f"Points are means over seeds with their {_CONFIDENCE} intervals, hollow where seeds are missing; the "
    "small ones beside them are the seeds."
)

SIGNS = (
    f"{MARKS['above']} {MARKS['below']} differ from the reference after Holm's correction within the exhibit "
    f"(paired t-test, two-sided); {MARKS['above before']} {MARKS['below before']} only before it; "
    f"{MARKS[statistics.NOT_TOLD_APART]} not told apart; {MARKS[statistics.TOO_FEW_SEEDS]} fewer than "
    f"{statistics.MIN_SEEDS} seeds, not tested."
)
LEGEND = (
    f"A cell is the mean over seeds ± half of its {_CONFIDENCE} t-interval (number of seeds), percentages in "
    "points; below it the mean difference to the reference of the same seeds, ± the same. Intervals are "
    "about seeds: the held-out items are the same ones throughout. A dash is a model that is not there, or "
    "an interval that one seed does not have.",
    SIGNS,
    "Rows in italics are the paper's, for its full-size data, with the difference to the paper's own CLIP: "
    "beside ours to see what was claimed, not to compare levels.",
)
SEARCH = "Whether another setting does better than the recipe is the subject of a search of its own"
SUMMARY = (
    "Paired comparisons with CLIP, in Figure 3 also with the recipe's λ. Better and worse: after Holm's "
    "correction within the exhibit; in Figure 6 they read higher and lower."
)
CAPTIONS = {
    "figure3": f"{_POINTS} The dashed line and its band are CLIP's. The grey panels are redrawn from what "
    "could be read off the paper's figure; dotted is its RankCLIP with the scheduled λ.",
    "figure4": f"{_POINTS} Every model is trained for the same number of steps, so fewer pairs are seen more "
    "often. The grey panel is redrawn from what could be read off the paper's figure.",
    "figure6": "One seed. UMAP is fitted to each model by itself, to both modalities together, so distances "
    "can only be compared within a panel; lines join pairs, contours hold a quarter, half and three quarters "
    "of the points, dashed are the medians of the first dimension. The gap is that of the embeddings.",
    "figure7": "Red: covering the place lowers the cosine of picture and text; blue: it raises it. Each map "
    "is scaled by its own largest change, the number below it: colours cannot be compared between maps.",
}
