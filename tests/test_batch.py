from __future__ import annotations

import pytest
import torch

from rankloss.batch import Batch


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_number_as_scale_has_the_digits_of_the_wider_features(dtypes) -> None:
    batch = Batch.of(*(torch.eye(2, dtype=dtype) for dtype in dtypes), 1 / 0.07)
    assert batch.inputs.scale.item() == 1 / 0.07
    assert {x.dtype for x in batch.inputs if x is not None} == {torch.float64}


def test_a_teacher_has_no_graph_and_the_dtype_of_the_features() -> None:
    teacher = torch.eye(4).bfloat16().requires_grad_()
    reference = Batch.of(torch.eye(4, 3), torch.eye(4, 3), 1.0, teacher=(teacher, None)).teacher["text"]
    assert (reference.requires_grad, reference.dtype) == (False, torch.float32)
