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

_SMALLEST, _LARGEST = -(2**63), 2**63 - 1  # of the integers of 64 bits
_PLACES = 2**16  # of a text or a row that have factors of their own; later places have the same again


def make_ids(values: Sequence[Any] | Tensor, column: str) -> Tensor:
    """The ids of a batch or a whole column: ``[N]``, int64, the same on all processes and in every run.

    Integers are ids as they are. A text, such as a caption or a file name, has 64 bits of its hash. Texts
    share an id if they are equal in every character, spaces and case included.

    Args:
        values: N texts, N integers of Python or NumPy, or a tensor of integers ``[N]``.
        column: The name of the column, for the errors.

    Raises:
        ValueError: for floats, booleans, missing values, texts beside integers, integers beyond int64, a
            tensor that is no vector, one text in place of several, or a blank text, unless the column is
            :data:`CAPTIONS`.

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
        are_integers = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
        if values.dim() != 1 or not are_integers:
            shown = f"{values.dtype} {list(values.shape)}".removeprefix("torch.")
            raise ValueError(f"ids of pairs must be integers [N]; column {column} has {shown}")
        if values.dtype == torch.uint64:  # of which some are beyond int64
            for row, value in enumerate(values.tolist()):
                _check_id(value, row, column)
        return values.long()
    ids = []
    for row, value in enumerate(values):
        _check_id(value, row, column)
        is_text, first_is_text = isinstance(value, str), isinstance(values[0], str)
        if is_text != first_is_text:
            raise ValueError(
                f"ids of pairs must be all texts or all integers; column {column} has {values[0]!r} in row 0 "
                f"and {value!r} in row {row}"
            )
        ids.append(hash_identity(identify(value)) if is_text else int(value))
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _check_id(value: Any, row: int, column: str) -> None:
    """Raise a ValueError for a value that is neither a text nor an integer within int64."""
    if column == CAPTIONS and isinstance(value, str):
        return  # also an empty one, which check_id refuses in any other column
    check_id(f"ids in column {column}", value, row)
    if not isinstance(value, str) and not _SMALLEST <= int(value) <= _LARGEST:
        raise ValueError(f"ids of pairs must be within int64; column {column} has {value} in row {row}")


def hash_tokens(inputs: Mapping[str, Tensor], processor: Any) -> Tensor:
    """The ids of tokenized texts, ``[N]``: hashes of the tokens, made on their device without a wait.

    An id is Σᵢ (aᵢ·tokenᵢ + bᵢ) modulo 2⁶⁴ over the places i of the text, with odd aᵢ and bᵢ that are the
    same everywhere. Padding, on either side, does not count.

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
    tokens, mask, pad = inputs["input_ids"], inputs.get("attention_mask"), _padding(processor)
    if "offsets" in inputs:  # of a StaticEmbedding
        return _hash_joined(tokens, inputs["offsets"])
    if mask is not None:
        is_text = mask != 0
    elif pad is not None:
        is_text = _from_first_to_last(tokens != pad)
    else:
        raise ValueError(
            "attention_mask, or a tokenizer with a pad_token_id, has to tell the padding, which ids of "
            f"captions leave out; got {', '.join(inputs)}"
        )
    counted = is_text.long()
    places = counted.cumsum(-1) - counted  # of each token among its text's
    ids: Tensor = (_hashes(tokens, places) * counted).sum(-1)
    return ids


def _hash_joined(tokens: Tensor, starts: Tensor) -> Tensor:
    """The ids of texts whose tokens stand in one row, each from its start on."""
    places = torch.arange(len(tokens), device=tokens.device)
    texts = torch.searchsorted(starts, places, right=True) - 1  # the text of each token
    hashes = _hashes(tokens, places - starts[texts])
    return torch.zeros_like(starts).index_add(0, texts, hashes)


def _from_first_to_last(is_no_pad: Tensor) -> Tensor:
    """True from the first to the last token of each row that is no padding: a text may have the pad token."""
    counts = is_no_pad.long()
    is_begun = counts.cumsum(-1) > 0
    is_to_come = counts.flip(-1).cumsum(-1).flip(-1) > 0
    return is_begun & is_to_come


def has_padding(inputs: Mapping[str, Any], processor: Any) -> bool:
    """True for inputs with tokens whose padding is known, as :func:`hash_tokens` needs them."""
    is_known = "attention_mask" in inputs or "offsets" in inputs or _padding(processor) is not None
    return "input_ids" in inputs and is_known


def _padding(processor: Any) -> int | None:
    """The token of padding of a tokenizer, or of a processor that holds one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    token: int | None = getattr(tokenizer, "pad_token_id", None)
    return token


def hash_rows(rows: Tensor) -> Tensor:
    """The ids of pictures by their content, ``[N]``: hashes of rows, made on their device without a wait.

    A row is split into blocks. With odd factors a and b that are the same everywhere, the hash of a block is
    Σᵢ aᵢ·bitsᵢ over its values i, and the hash of the row is Σⱼ bⱼ·hashⱼ over its blocks j, both modulo 2⁶⁴.

    Args:
        rows: The pixels, ``[N, …]``, of any dtype.

    Example:
        >>> pixels = torch.tensor([[0.5, 1.0], [1.0, 0.5], [0.5, 1.0]])
        >>> (hash_rows(pixels)[:, None] == hash_rows(pixels)).int().tolist()
        [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    dtype_of_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    factors_of_values, factors_of_blocks = _factors(rows.device)

    def hashed(row: Tensor) -> Tensor:
        blocks = row.long().split(_PLACES)
        hashes = torch.stack([(block * factors_of_values[: len(block)]).sum() for block in blocks])
        of_row: Tensor = (hashes * factors_of_blocks[: len(blocks)]).sum()
        return of_row

    bits = rows.detach().contiguous().flatten(1).view(dtype_of_bits)
    return torch.stack([hashed(row) for row in bits])  # row by row: long() takes up to eight times the memory


def _hashes(tokens: Tensor, places: Tensor) -> Tensor:
    """A number of 64 bits for each token and its place in its text; the offset tells a token 0 from none."""
    factor, offset = _factors(tokens.device)[:, places % _PLACES]
    hashes: Tensor = tokens.long() * factor + offset
    return hashes


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Two odd numbers of 64 bits for each place, ``[2, places]``, whatever a batch's longest text."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**62), 2**62, (2, _PLACES), generator=generator, device="cpu")
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
    none = equals_next.new_zeros(1)  # the first has no one before it, the last no one behind it
    has_partner = torch.cat([none, equals_next]) | torch.cat([equals_next, none])
    return has_partner.sum()
