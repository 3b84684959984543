"""Shared by the tests of all studies: made-up records, and checks of comparisons and of a README."""

from __future__ import annotations

import contextlib
import io
import random
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

EXAMPLES = Path(__file__).parents[2] / "examples"


def records(metrics):
    """Return a function that finds a record of every setting, with these metrics of it; None is no record."""

    def find(settings):
        found = {one: metrics(one) for one in settings}
        return {one: {"metrics": of} for one, of in found.items() if of is not None}

    return find


def decided(means, metrics):
    """Return such a function for arms of these means, 10 by default, with little spread over their seeds."""
    return records(
        lambda one: metrics(means.get(one.arm, 10.0) + random.Random(f"{one.arm} {one.seed}").gauss(0, 0.005))
    )


def assert_corrected(found, pairs, others=()):
    """Assert that differences are those of paired tests, corrected by Holm, together with other p values.

    ``pairs`` are the values of both arms, seed by seed, of every difference.
    """
    p = [stats.ttest_rel(*pair).pvalue for pair in pairs]
    assert [one.mean for one in found] == pytest.approx([np.mean(np.subtract(*pair)) for pair in pairs])
    known = np.flatnonzero(~np.isnan(p))  # without any spread there is no test
    holm = multipletests([*np.array(p)[known], *others], method="holm")[1]
    assert [found[i].adjusted for i in known] == pytest.approx(holm[: len(known)])


def printed_by_readme(example, results, store, folder, monkeypatch):
    """Return the lines that an example's README prints by its Python, beside a store's records."""
    readme = (EXAMPLES / example / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    path = folder / "examples" / example / results / "records.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(store.path.read_bytes())
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue().splitlines()


def assert_reported_again(main, options, written):
    """Assert that a command's report follows from its records alone."""
    text = written.read_text(encoding="utf-8")
    written.unlink()
    assert main([*options, "--report-only"]) == 0
    assert written.read_text(encoding="utf-8") == text
