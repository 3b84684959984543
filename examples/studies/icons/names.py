"""Turns an icon's name into a caption, a style and the concept that the split goes by.

Names are built from words joined with hyphens, in every set in its own way: ``account-heart-outline``,
``outline-account-circle``, ``account-24-filled``, ``account-01``, ``bag2``. What remains of a name without
the words for style and size is the caption; without numbering as well, whatever the order of the words and
their number, it is the concept.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from . import SETS

_STYLES: dict[str, str] = SETS["styles"]
_ALWAYS = set(SETS["always_styles"])
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNT = re.compile(r"\d{1,3}|" + "|".join(_NUMBERS))
_SIZE = re.compile(r"\d+px|\d+x")
_GLUED = re.compile(r"([a-z]{3,})(\d{1,2})")
_FILLERS = {"alt", "alternate", "variant"}
_GENDERS = {"man", "woman", "men", "women", "boy", "girl", "person", "people", "mr", "mrs", "mx"}
SKIN_TONE = re.compile(r"-(medium-)?(light|dark|medium)(-skin-tone(-|$)|$)|-tone-?\d|skin-tone")  # of emojis
_MAX_WORDS = 12


@dataclasses.dataclass(frozen=True)
class Name:
    """Parts of an icon's name."""

    caption: str  # the words of the name, without style, size and numbering
    style: str  # how it is drawn, such as "bold duotone"; empty where the name does not say
    concept: str  # sorted words of the caption, singular, without final numbers: equal for equal meanings


class Namer:
    """Reads the names of one icon set, given all of them, and the styles that it declares.

    A word is taken for a style where the icon exists in another style too. An ``emoji``'s variants for gender
    are one concept.
    """

    def __init__(
        self,
        prefix: str,
        names: Iterable[str],
        *,
        suffixes: Collection[str] = (),
        prefixes: Collection[str] = (),
        emoji: bool = False,
    ) -> None:
        self._prefix, self._emoji = prefix, emoji
        self._declared = {word for suffix in suffixes for word in suffix.split("-") if word}
        self._declared |= set(SETS["undeclared_styles"].get(prefix, ()))
        self._heads = {word for word in prefixes if word} | set(SETS["undeclared_prefixes"].get(prefix, ()))
        split = [self._split(name) for name in names]
        self._variants = Counter(stem for stem, _ in split)
        self._runs = defaultdict[tuple[str, ...], set[int]](set)
        for stem, _ in split:
            for words in {stem, self._unglue(stem)}:
                if len(words) > 1 and _COUNT.fullmatch(words[-1]):
                    self._runs[words[:-1]].add(_number(words[-1]))

    def __call__(self, name: str) -> Name | None:
        """Return what ``name`` says, or None if it is no caption: no letters, or far too many words."""
        words, styles = self._split(name)
        if self._variants[words] < 2 and not _ALWAYS.issuperset(styles):
            words, styles = _words(name), ()
        words = self._unnumber(self._unglue(words))
        while len(words) > 1 and words[-1] in _FILLERS:
            words = words[:-1]
        if not words or len(words) > _MAX_WORDS or not re.search("[a-z]", "".join(words)):
            return None
        style = " ".join(dict.fromkeys(_STYLES.get(s, s) for s in styles if s not in SETS["neutral_styles"]))
        return Name(" ".join(words), style, concept_of(words, emoji=self._emoji))

    def _split(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Strip style and size words from both ends."""
        words, tail = list(_words(name)), list[str]()
        styles = [words.pop(0)] if len(words) > 1 and words[0] in self._heads else []
        while len(words) > 1:
            last = words[-1]
            if _SIZE.fullmatch(last) or (last.isdigit() and last in self._declared):
                pass
            elif last in self._declared or last in _STYLES:
                tail.append(last)
            elif last == "o" and self._prefix in SETS["one_letter_outline"]:
                tail.append("outline")
            elif last == "tone" and words[-2] == "two" and len(words) > 2:
                tail.append("duotone")
                words.pop()
            else:
                break
            words.pop()
        return tuple(words), (*styles, *reversed(tail))

    def _unglue(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """Turn ``bag2`` into ``bag 2`` where ``bag`` or ``bag1`` is an icon, too."""
        match = _GLUED.fullmatch(words[-1])
        if match is None:
            return words
        stem = (*words[:-1], match[1])
        others = {stem, (*words[:-1], f"{match[1]}1")} - {words}
        return (*stem, match[2]) if others & self._variants.keys() else words

    def _unnumber(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """Drop a final number that only tells drawings of one thing apart; keep it on dice and clocks."""
        if len(words) < 2 or not _COUNT.fullmatch(words[-1]):
            return words
        stem = words[:-1]
        numbers = self._runs.get(stem, set())
        counts_something = len(numbers) > 3 and max(numbers) > 3
        return words if counts_something else stem


def _number(word: str) -> int:
    """Return the number that a word of digits or letters names."""
    return int(word) if word.isdigit() else _NUMBERS.index(word) + 1


def _words(name: str) -> tuple[str, ...]:
    """Return the words of a name, in small letters."""
    return tuple(word for word in re.split(r"[-_\s]+", name.lower()) if word)


def _singular(word: str) -> str:
    """Return a word without its plural s, as far as its end tells; short words stay."""
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def concept_of(words: Iterable[str], *, emoji: bool = False) -> str:
    """Return the concept of a name's words, such as ``arrow circle up`` for ``arrow up circles 2``."""
    kept = list(words)
    while len(kept) > 1 and (_COUNT.fullmatch(kept[-1]) or kept[-1] in _FILLERS):
        kept.pop()
    plain = [word for word in kept if word not in _FILLERS and word not in _ALWAYS]
    if emoji:
        plain = [word for word in plain if word not in _GENDERS]
    return " ".join(sorted({_singular(word) for word in plain or kept}))
