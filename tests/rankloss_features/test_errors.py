"""The messages of the commands' errors."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, Dataset

from rankloss_features.errors import message_of


class Broken(Dataset[int]):
    """Rows of which none can be read."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> int:
        try:
            raise ValueError("the first error")
        except ValueError as error:
            raise ValueError(self.message) from error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("message", ["row 5: no picture", "row 5:\nof two lines", "no colon"])
def test_an_error_has_its_message_whichever_process_reads(workers: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message of a worker is its traceback)
        list(DataLoader(Broken(message), num_workers=workers))
    assert message_of(caught.value) == message
