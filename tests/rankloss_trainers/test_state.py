"""The state of a loss as an entry of a checkpoint."""

from __future__ import annotations

import rankloss
from rankloss_baselines import AlipLoss
from rankloss_trainers import state


def test_state_goes_there_and_back_and_to_no_other_loss() -> None:
    loss, fresh = AlipLoss(initial_history=0.25), AlipLoss()
    entry = state.saved("alip", loss)
    loss.histories.fill_(0.5)
    assert "no state" in state.restore("alip", fresh, None)
    assert "--loss other" in state.restore("alip", fresh, {**entry, "loss": "other"})
    assert fresh.histories.tolist() == [1, 1, 1]
    assert state.restore("alip", fresh, entry) == ""
    assert fresh.histories.tolist() == [0.25] * 3, "a copy, not a view"
    assert state.has_state(loss)
    assert not state.has_state(rankloss.RankClipLoss())
