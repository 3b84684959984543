"""Ids of pairs that belong together, as data: made from texts or integers, checked, and counted."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankloss.checks import check_id, check_several
from rankloss_trainers.graded.lists import hash_identity, identify

CAPTIONS = "captions"
"""The key of ids that are equal for equal captions."""

_LARGEST = 2**63 - 1
_LONGEST = 2**16  # tokens of a text; later places begin anew


def make_ids(values: Sequence[Any] | Tensor, column: str) -> Tensor:
    """The ids of a batch or a whole column: ``[N]``, int64, the same on all processes and in every run.

    Integers are ids as they are. A text, such as a caption or a file name, has 64 bits of its hash. Texts are
    equal to the last character.

    Args:
        values: N texts, N integers of Python or NumPy, or a tensor of integers ``[N]``.
        column: The name of the column, for the errors.

    Raises:
        ValueError: for floats, booleans, missing values, texts beside integers, or integers beyond 64 bits.

    Example:
        >>> ids = make_ids(["a cat", "a dog", "a cat"], "caption")
        >>> bool(ids[0] == ids[2]), bool(ids[0] == ids[1])
        (True, False)
        >>> make_ids([0.5, 1.0], "score")
        Traceback (most recent call last):
        ValueError: ids in column score must be texts or integers; row 0 has float 0.5
    """
    check_several(f"ids in column {column}", values)
    if isinstance(values, Tensor):
        is_other = values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
        if values.dim() != 1 or is_other:
            shown = f"{values.dtype} {list(values.shape)}".removeprefix("torch.")
            raise ValueError(f"ids of pairs must be integers [N]; column {column} has {shown}")
        return values.long()
    ids = []
    for row, value in enumerate(values):
        _check_id(value, row, column)
        if isinstance(value, str) != isinstance(values[0], str):
            raise ValueError(
                f"ids of pairs must be all texts or all integers; column {column} has {values[0]!r} in row 0 "
                f"and {value!r} in row {row}"
            )
        ids.append(hash_identity(identify(value)) if isinstance(value, str) else int(value))
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _check_id(value: Any, row: int, column: str) -> None:
    """Raise a ValueError for a value that is neither a text nor an integer of 64 bits."""
    if column == CAPTIONS and isinstance(value, str):
        return  # an empty caption is one
    check_id(f"ids in column {column}", value, row)
    if not isinstance(value, str) and not -_LARGEST - 1 <= int(value) <= _LARGEST:
        raise ValueError(f"ids of pairs must have 64 bits; column {column} has {value} in row {row}")


def hash_tokens(inputs: Mapping[str, Tensor], processor: Any) -> Tensor:
    """The ids of tokenized texts, ``[N]``: hashes of the tokens, made on their device without a wait.

    They are linear in the tokens, modulo 2⁶⁴, with odd factors that are the same everywhere. Padding, on
    either side, does not count.

    Args:
        inputs: The inputs of a model. ``input_ids``, ``[N, L]``, with ``attention_mask``, zero at padding; or
            the tokens of all texts in a row, with ``offsets``, ``[N]``, the places where texts begin.
        processor: The tokenizer, or a processor that holds it; without a mask its ``pad_token_id`` tells the
            padding.

    Raises:
        ValueError: There are no tokens, or nothing tells their padding.

    Example:
        >>> tokens, mask = torch.tensor([[5, 7, 0], [7, 5, 0], [0, 5, 7]]), [[1, 1, 0], [1, 1, 0], [0, 1, 1]]
        >>> ids = hash_tokens({"input_ids": tokens, "attention_mask": torch.tensor(mask)}, None)
        >>> (ids[:, None] == ids).int().tolist()
        [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    if "input_ids" not in inputs:
        raise ValueError(f"input_ids are needed for ids of captions; got {', '.join(inputs)}")
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    if "offsets" in inputs:  # of a StaticEmbedding
        starts, place = inputs["offsets"], torch.arange(len(tokens), device=tokens.device)
        text = torch.searchsorted(starts, place, right=True) - 1
        return torch.zeros_like(starts).index_add(0, text, _hashes(tokens, place - starts[text]))
    if mask is None:
        pad = _padding(processor)
        if pad is None:
            raise ValueError(
                "attention_mask, or a tokenizer with a pad_token_id, has to tell the padding, which ids of "
                f"captions leave out; got {', '.join(inputs)}"
            )
        is_text = (tokens != pad).long()  # a text may have the token inside
        mask = is_text.cumsum(-1) * is_text.flip(-1).cumsum(-1).flip(-1)
    used = (mask != 0).long()
    ids: Tensor = (_hashes(tokens, used.cumsum(-1) - used) * used).sum(-1)
    return ids


def has_padding(inputs: Mapping[str, Any], processor: Any) -> bool:
    """True for inputs with tokens whose padding is known, as :func:`hash_tokens` needs them."""
    is_known = "attention_mask" in inputs or "offsets" in inputs or _padding(processor) is not None
    return "input_ids" in inputs and is_known


def _padding(processor: Any) -> int | None:
    """The token of padding of a tokenizer, or of a processor that holds one."""
    token: int | None = getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None)
    return token


def hash_rows(rows: Tensor) -> Tensor:
    """The ids of pictures by their content, ``[N]``: hashes of rows, made on their device without a wait.

    Args:
        rows: The pixels, ``[N, …]``, of any dtype.

    Example:
        >>> pixels = torch.tensor([[0.5, 1.0], [1.0, 0.5], [0.5, 1.0]])
        >>> (hash_rows(pixels)[:, None] == hash_rows(pixels)).int().tolist()
        [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    of_values, of_blocks = _factors(rows.device)

    def hashed(row: Tensor) -> Tensor:
        blocks = row.long().split(_LONGEST)
        hashes = torch.stack([(block * of_values[: len(block)]).sum() for block in blocks])
        found: Tensor = (hashes * of_blocks[: len(blocks)]).sum()
        return found

    return torch.stack([hashed(row) for row in rows.detach().contiguous().flatten(1).view(integers)])


def _hashes(tokens: Tensor, places: Tensor) -> Tensor:
    """A number of 64 bits for each token and its place in its text; a token 0 has one too."""
    factor, offset = _factors(tokens.device)[:, places % _LONGEST]
    hashes: Tensor = tokens.long() * factor + offset
    return hashes


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Odd numbers of 64 bits, two for each place of a text; they do not depend on a batch's longest one."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**62), 2**62, (2, _LONGEST), generator=generator, device="cpu")
    return (numbers * 2 + 1).to(device)


def check_column(ids: Tensor, column: str) -> None:
    """Raise a ValueError for a whole column of one id, by which all pairs would belong together.

    Args:
        ids: ``[N]``, of all rows of the data.
        column: The name of the column.

    Example:
        >>> check_column(torch.tensor([7, 7, 7]), "split")
        Traceback (most recent call last):
        ValueError: column split has one value in all 3 rows, so all pairs would belong together
    """
    if len(ids) > 1 and bool((ids == ids[0]).all()):
        raise ValueError(
            f"column {column} has one value in all {len(ids)} rows, so all pairs would belong together"
        )


def count_partners(ids: Tensor) -> Tensor:
    """The number of pairs of a batch that have a partner in it, on the ids' device, without a wait.

    Example:
        >>> count_partners(torch.tensor([3, 1, 3, 2, 3]))
        tensor(3)
    """
    ordered = ids.sort().values
    equals_next = ordered[1:] == ordered[:-1]
    edge = equals_next.new_zeros(1)
    return (torch.cat([edge, equals_next]) | torch.cat([equals_next, edge])).sum()
