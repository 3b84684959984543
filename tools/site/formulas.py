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
    """One line of a formula in TeX, token by token."""
    parts = []
    position = 0
    while token := _TOKEN.match(line, position):
        position = token.end()
        if token["root"]:
            end = _closing(line, position)
            radicand = line[position + 1 : end]
            parts.append(rf"\sqrt{{{_line(radicand)}}}")
            position = end + 1
        else:
            parts.append(_token(token))
    return "".join(parts)


def _token(token: re.Match[str]) -> str:
    """A token in TeX, of any kind but a root."""
    text = token[0]
    if token["subscript"]:
        return text if text == "_{" else f"_{{{text[1:]}}}"
    if token["gap"]:
        return r"\qquad "
    if token["word"]:
        return _word(text)
    if token["greek"]:
        letter, index = token["greek"], token["index"]
        last_word = unicodedata.name(letter).split()[-1]  # of GREEK SMALL LETTER MU, say
        name = _GREEK.get(letter) or last_word.lower()
        return rf"\{name} " + (f"_{{{index}}}" if index else "")
    return _SIGNS.get(text, text)


def _word(word: str) -> str:
    """Names are upright; words of a sentence have spaces around them."""
    name = word.replace("_", r"\_")
    if word in _OPERATORS:
        return rf"\operatorname{{{name}}}"
    if word in ("where", "else"):
        return rf"\;\text{{{name}}}\;"
    return rf"\mathrm{{{name}}}"


def _closing(text: str, opening: int) -> int:
    """Position at which the bracket at ``opening`` closes."""
    depth = 0
    for position in range(opening, len(text)):
        if text[position] == "(":
            depth += 1
        elif text[position] == ")":
            depth -= 1
        if depth == 0:
            return position
    raise ValueError(f"a root's bracket does not close in {text!r}")
