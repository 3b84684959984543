"""The state of a loss as an entry of a checkpoint."""

from __future__ import annotations

import torch

import rankloss
import rankloss_baselines
from rankloss_trainers import state


def test_state_goes_there_and_back() -> None:
    loss = rankloss_baselines.AlipLoss(initial_history=0.25)
    entry = state.saved("alip", loss)
    loss.histories.fill_(0.5)
    assert entry["state_dict"]["histories"].tolist() == [0.25] * 3, "a copy, not a view"
    fresh = rankloss_baselines.AlipLoss()
    assert state.restore("alip", fresh, entry) == ""
    assert torch.equal(fresh.histories, entry["state_dict"]["histories"])


def test_what_is_not_its_state_is_not_loaded() -> None:
    loss = rankloss_baselines.AlipLoss()
    assert state.restore("alip", loss, None) == "no state of a loss"
    other = state.saved("other", rankloss_baselines.AlipLoss(initial_history=0.0))
    assert state.restore("alip", loss, other) == "the state of --loss other"
    assert loss.histories.tolist() == [1, 1, 1]


def test_only_some_losses_have_one() -> None:
    assert state.has_state(rankloss_baselines.AlipLoss())
    assert not state.has_state(rankloss.RankClipLoss())
