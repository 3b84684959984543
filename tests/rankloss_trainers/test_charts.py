"""Pictures of the rank agreement; what the trainers store of them is in the tests of each trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankloss_trainers.charts import NAME, AgreementCharts, picture


def test_a_chart_is_drawn_when_it_is_due(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    stored: list[tuple[str, Any, int]] = []
    charts = AgreementCharts([lambda *given: stored.append(given)])
    pair = torch.eye(4), torch.eye(4)
    charts.draw(*pair, step=3)
    charts.due(2, 4)
    charts.draw(*pair, step=3)
    charts.draw(*pair, step=3)
    ((name, figure, step),) = stored
    assert (name, step) == (NAME, 7)
    # An image of PIL's, which W&B takes whatever has been imported.
    width, height = figure.get_size_inches() * figure.dpi
    assert picture(figure).size == (int(width), int(height))
    assert not caplog.records


def test_a_chart_that_fails_ends_no_training(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    charts = AgreementCharts([fail])
    for step in (1, 2):
        charts.due(1, step)
        charts.draw(torch.eye(4), torch.eye(4), 0)
    (record,) = caplog.records
    assert "disk full" in record.message
