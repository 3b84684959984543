"""Formulas as the docstrings write them, translated to TeX.

A docstring is read in an editor and by ``help()``, so its formulas are plain text with the field's signs, as
in ``½[C(S | R) + C(R | S)]``. :func:`to_tex` makes of each what a mathematical renderer needs.
"""

from __future__ import annotations

import re
import unicodedata

_SIGNS = {
    "½": r"\tfrac{1}{2}",
    "·": r"\cdot ",
    "‖": r"\Vert ",
    "−": "-",
    "∘": r"\circ ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\neq ",
    "∂": r"\partial ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "…": r"\dots ",
    "ᵀ": r"^{\top}",
    "²": "^{2}",
    "ʳ": "^{r}",
    "ᶜ": "^{c}",
    "₀": "_{0}",
    "|": r"\mid ",
    "%": r"\%",
}
_GREEK = {"λ": "lambda", "ℓ": "ell", "Σ": "sum"}  # the others are called as Unicode calls them
_OPERATORS = {"log", "exp", "min", "max", "cos", "clip", "softmax"}
_TOKEN = re.compile(
    r"""(?P<root>√)
    | (?P<subscript>_(?:\{ | [a-zA-Z0-9](?:,[a-z](?![a-z]))? [a-z]*))
    | (?P<gap>\s{2,})
    | (?P<word>[A-Za-z]{2,}(?:_[a-z]{2,})*)
    | (?P<greek>[α-ωΣℓ])(?P<index>\d?)
    | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


def to_tex(formula: str) -> str:
    """The formula in TeX; the lines of several are set one below the other."""
    lines = [_line(line.strip()) for line in formula.strip().splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else r"\begin{gathered}" + r"\\[0.4em]".join(lines) + r"\end{gathered}"


def _line(line: str) -> str:
    parts = []
    position = 0
    while match := _TOKEN.match(line, position):
        position = match.end()
        kind = match.lastgroup
        text = match[0]
        if kind == "root":
            end = _closing(line, position)
            parts.append(rf"\sqrt{{{_line(line[position + 1 : end])}}}")
            position = end + 1
        elif kind == "subscript":
            parts.append(text if text == "_{" else f"_{{{text[1:]}}}")
        elif kind == "gap":
            parts.append(r"\qquad ")
        elif kind == "word":
            is_operator = text in _OPERATORS
            name = text.replace("_", r"\_")
            parts.append(rf"\operatorname{{{name}}}" if is_operator else _word(name))
        elif match["greek"]:
            name = _GREEK.get(match["greek"]) or unicodedata.name(match["greek"]).split()[-1].lower()
            parts.append(rf"\{name} " + (f"_{{{match['index']}}}" if match["index"] else ""))
        else:
            parts.append(_SIGNS.get(text, text))
    return "".join(parts)


def _word(name: str) -> str:
    """Names are upright; words of a sentence have spaces around them."""
    return rf"\;\text{{{name}}}\;" if name in ("where", "else") else rf"\mathrm{{{name}}}"


def _closing(text: str, opening: int) -> int:
    """Position at which the bracket at ``opening`` closes."""
    depth = 0
    for position in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"a root's bracket does not close in {text!r}")
