"""The list of subjects is complete, and the two oracles say the same of every one."""

from __future__ import annotations

import types

import pytest
import torch
from subjects import KINDS, NO_SUBJECTS, SUBJECTS, Subject, data, expected

import rankloss


def public_names() -> set[str]:
    """``rankloss.__all__``; for a module, the functions and classes that are not at the top as well."""
    names, modules = set(), set()
    for name in rankloss.__all__:
        is_module = isinstance(getattr(rankloss, name), types.ModuleType) and name not in NO_SUBJECTS
        (modules if is_module else names).add(name)
    at_the_top = [getattr(rankloss, name) for name in names]
    for name in modules:
        module = getattr(rankloss, name)
        for part in module.__all__:
            value = getattr(module, part)
            is_alias = isinstance(value, types.GenericAlias)
            is_callable = isinstance(value, types.FunctionType | type) and not is_alias
            if is_callable and not any(value is other for other in at_the_top):
                names.add(f"{name}.{part}")
    return names


def test_every_public_name_is_a_subject_or_is_none_for_a_reason() -> None:
    covered = {subject.covers for subject in SUBJECTS}
    assert covered | NO_SUBJECTS.keys() == public_names()
    assert not covered & NO_SUBJECTS.keys()


def test_no_two_subjects_have_one_name() -> None:
    assert len({subject.name for subject in SUBJECTS}) == len(SUBJECTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.differentiates], ids=str)
def test_both_oracles_agree(subject: Subject, kind: str) -> None:
    if subject.has_no_value(kind):
        pytest.skip("refused")
    inputs = subject.pick(data(kind))
    value = expected(subject, inputs).value
    with_numpy = subject.reference(**{k: x.numpy() for k, x in inputs.items()})
    torch.testing.assert_close(
        value, torch.as_tensor(with_numpy, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
