"""The report of part 1, from its records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from examples_common.statistics import MIN_SEEDS, Difference
from examples_common.wording import (
    difference_text,
    mark,
    marked,
    mean_text,
    p_text,
    signed,
    write_report,
)

from . import figure, plan
from .findings import CORRELATION, DIRECTIONS, DRAWN, PRIMARY, SCALE, SECONDARY, Findings, findings
from .plan import COMPONENTS, Find, Plan, Search

_PUBLISHED = (
    ("Kiros et al. 2014", "18.0", "40.9", "55.0", "8", "12.5", "37.0", "51.5", "10", ""),
    ("the same, their code of 2015", "22.3", "48.7", "59.8", "6", "14.9", "38.3", "51.6", "10", ""),
    ("Klein et al. 2015, mean vector", "22.6", "48.8", "61.2", "6", "19.1", "45.3", "60.4", "7", ""),
    ("CLIPScore 2021, ViT-B/32", *[""] * 8, "51.2"),
)


def write(sizes: Plan, find: Find, folder: Path) -> Path:
    """Write the report and return its path."""
    searches = {loss: plan.search(sizes, loss, find) for loss in plan.TUNED}
    over = not searches["clip"].due
    values: dict[str, Any] = {}
    if over:
        found = findings(plan.arms(sizes, *searches.values(), find), find)
        panels = {
            title: {name: found.difference(name, m) for name in found.rows} for m, title in DRAWN.items()
        }
        values = {
            "alt": figure.write(folder / "part1.png", panels),
            "missing": sum(len(arm.seeds) - len(found.records[name]) for name, arm in found.arms.items()),
            "conclusions": conclusions(found),
            "arms": _arms(found),
            "arm_head": ["arm", *(measure.title for measure in _SHOWN)],
            "tests": _tests(found),
            "secondary": _secondary(found),
            "secondary_head": ["", *(f"`{name}`" for name in found.rows)],
            "published": [*_PUBLISHED, *_beside(found)],
            "conditions": _conditions(found),
        }
    return write_report(
        folder / "part1.md",
        Path(__file__).with_name("report.md"),
        sizes=sizes,
        over=over,
        measured=over and any(found.records.values()),
        searches=searches.values(),
        chosen={loss: _text(search) for loss, search in searches.items()},
        factors=_factors(searches),
        **values,
    )


# --- the plan's sentences ---


def conclusions(found: Findings) -> list[str]:
    """Return the plan's sentences for the findings; none for a comparison that lacks a training."""
    if any(arm.seeds and len(arm.seeds) < MIN_SEEDS for arm in found.arms.values()):
        return [f"Nothing is concluded from fewer than {MIN_SEEDS} seeds."]
    gains = {name: found.primary(name) for name in ("rankclip", "rankclip-tuned") if name in found.rows}
    known = {name: d for name, d in gains.items() if d is not None}
    said = [_of_recall(name, d) for name, d in known.items()]
    said += [_of_term(name, d) for name in COMPONENTS if (d := found.primary(name)) is not None]
    if any(d.established and d.mean > 0 for d in known.values()):
        said += _of_gain(found)
    if (pilots := found.primary("rankclip, the pilot's setting")) is not None:
        text = "confirmed" if _sign(pilots) > 0 else "not confirmed"
        said.append(f"The pilot's gain is {text} in its own setting: {_interval(pilots)}.")
    correlation = found.difference("rankclip", CORRELATION)
    if correlation is not None:
        said.append(_of_people(correlation))
    return said


def _sign(difference: Difference) -> int:
    """Return the sign of a difference that differs from 0 after the correction, else 0."""
    return 0 if not difference.established else 1 if difference.mean > 0 else -1


def _interval(d: Difference) -> str:
    ends = f"95 % interval {signed(d.low)} to {signed(d.high)}"
    return f"{signed(d.mean)} points ({ends}, {d.n} seeds, p {p_text(d.adjusted)} after the correction)"


_SETTINGS = {"rankclip": "CLIP's best setting", "rankclip-tuned": "its own best setting"}


def _of_recall(name: str, d: Difference) -> str:
    text = {1: "is higher", 0: "does not differ significantly from CLIP's", -1: "is lower"}[_sign(d)]
    bound = "; none beyond the interval's ends is likely" if _sign(d) == 0 else ""
    return f"**RankCLIP's R@10 in {_SETTINGS[name]} {text}: {_interval(d)}{bound}.**"


def _of_term(name: str, d: Difference) -> str:
    text = {1: "higher", 0: "no significant difference", -1: "lower"}[_sign(d)]
    return f"`{name}` minus CLIP, R@10: {text}, {_interval(d)}."


def _of_gain(found: Findings) -> list[str]:
    """Return the sentences on convergence and on the scale."""
    half, twice = found.primary("rankclip, half the epochs"), found.primary("rankclip, twice the epochs")
    said = []
    if twice is not None and _sign(twice) > 0:
        said.append(f"The gain remains at convergence: with twice the epochs {_interval(twice)}.")
    elif twice is not None:
        text = f"The gain is not shown at convergence: with twice the epochs {_interval(twice)}"
        if half is not None and half.mean > twice.mean:
            text += f"; with half of them {_interval(half)}, so it is faster convergence"
        said.append(f"{text}.")
    if (scale := found.primary("rankclip, equal scale")) is not None:
        text = (
            "is not that of a lower scale"
            if _sign(scale) > 0
            else "does not differ significantly from that of a scale"
        )
        said.append(f"The gain {text}: with the scale fixed for both {_interval(scale)}.")
    return said


def _of_people(d: Difference) -> str:
    if _sign(d) < 0:
        return f"**RankCLIP loses correlation with people: τ_c {_interval(d)}.**"
    text = "refuted: it is higher" if _sign(d) > 0 else "not confirmed"
    return f"The pilot's loss of correlation with people is {text}, τ_c {_interval(d)}."


# --- tables ---

_SHOWN = (PRIMARY, *DIRECTIONS, CORRELATION, SCALE)


def _text(search: Search) -> str:
    """Return a search's setting in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in search.chosen.items())


def _factors(searches: Mapping[str, Search]) -> list[list[str]]:
    """Return the searches' tries: a level in each row, a loss in each column."""
    rows: dict[tuple[str, float], dict[str, str]] = {}
    for loss, search in searches.items():
        for one in search.tries:
            scores = ", ".join(f"{score:.2f}" for score in one.scores)
            rows.setdefault((one.factor, one.level), {})[loss] = f"{scores}{' (taken)' * one.taken}"
    return [
        [factor.replace("_", " "), f"{level:g}", *(of.get(loss, "–") for loss in searches)]
        for (factor, level), of in rows.items()
    ]


def _arms(found: Findings) -> list[list[str]]:
    return [
        [f"`{name}`", *(mean_text(found.estimate(name, m), len(arm.seeds), m.digits) for m in _SHOWN)]
        for name, arm in found.arms.items()
        if arm.seeds
    ]


def _tests(found: Findings) -> list[list[str]]:
    rows = []
    for name, row in found.rows.items():
        d = found.primary(name)
        numbers = ["–"] * 5 if d is None else [
            difference_text(d), f"{d.n}", p_text(d.p), p_text(d.adjusted), mark(d)
        ]  # fmt: skip
        rows.append([f"`{name}`", f"`{row.reference}`", *numbers])
    return rows


def _secondary(found: Findings) -> list[list[str]]:
    """Return the differences: a measure in each row, a comparison in each column."""
    return [
        [m.title, *(marked(found.difference(name, m), m.digits) for name in found.rows)] for m in SECONDARY
    ]


def _beside(found: Findings) -> list[list[str]]:
    """Return the rows of our own means, in the published table's columns."""
    named = {measure.title: measure for measure in (*DIRECTIONS, *SECONDARY)}
    ways = ("picture → sentence", "sentence → picture")
    columns = [f"{score}, {way}" for way in ways for score in ("R@1", "R@5", "R@10", "median rank")]
    rows = []
    for name in ("clip", "rankclip"):
        estimates = [found.estimate(name, named[title]) for title in (*columns, CORRELATION.title)]
        rows.append([f"here: `{name}`", *("–" if e is None else f"{e.mean:.1f}" for e in estimates)])
    return rows


def _conditions(found: Findings) -> list[list[str]]:
    records = [record for of in found.records.values() for record in of.values()]
    if not records:
        return []
    seconds = [sum(record["processor_seconds"].values()) for record in records]
    kinds = sorted({", ".join(f"{k} {v}" for k, v in record["conditions"].items()) for record in records})
    trained = f"{len(records)}, {fmean(seconds):.0f} s of one core each"
    return [["trainings on the test side", trained], *(["made with", kind] for kind in kinds)]
