"""The loss for each kind of data, its options and its measured gain: the source of the pages' tables.

``python tools/cases.py`` writes them into README.md, docs/losses.md, docs/teachers.md and examples/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from rankloss_trainers import catalog
from rankloss_trainers.command_line import RUN, flag, prefix_of
from rankloss_trainers.declared import Loss
from rankloss_trainers.option import options_of

ROOT = Path(__file__).parents[1]
FOLDER = "teacher/"

CLIP = "--model MODEL --pretrained TAG"  # of any size: those measured were small
IMAGES, TEXTS = "--image-encoder efficientnet-lite0", "--text-encoder minilm"


@dataclass(frozen=True)
class Case:
    """A row: what a reader has, and the loss for it.

    Attributes:
        have: The reader's words.
        loss: The name of the loss.
        options: Those that the case needs; of joined losses by the name of each.
        features: The teacher of ``rankloss features``; empty without one.
        gain: Points over CLIP's loss with 95 % intervals, and the data that it was measured on.
        cost: The change of R@10 beside another gain; empty where the gain is R@10 itself.
        in_brief: The part of the gain that README shows; empty for all of it.
        on: The gain by data set, for the table of teachers.
        page: The page that has more, without its folder.
    """

    have: str
    loss: str
    options: Mapping[str, Any] = field(default_factory=dict)
    features: str = ""
    gain: str = ""
    cost: str = ""
    in_brief: str = ""
    on: tuple[str, str, str] = ("–", "–", "–")
    page: str = ""

    def losses(self) -> list[Loss]:
        """The losses with the options of the case alone."""
        names = catalog.names_of(self.loss)
        by_loss = self.options if catalog.JOIN in self.loss else {self.loss: self.options}
        return [Loss(name, catalog.load(name), by_loss.get(name, {})) for name in names]

    def command(self) -> str:
        """The options of a trainer's command line."""
        words = ["--loss", self.loss]
        for loss in self.losses():
            prefix, options = prefix_of(loss.name, loss.named), loss.named.options
            for name, value in loss.given.items():
                words.append(f"{flag(prefix, name)} {typed(options[name], value)}")
        if self.features:
            words.append(f"{flag(RUN, 'teacher')} {FOLDER}")
        return " ".join(words)

    def python(self) -> str:
        """The call that builds the same loss."""
        arguments = [shown(self.loss)]
        if catalog.JOIN in self.loss:
            if self.options:
                arguments.append(f"**{shown(self.options)}")
        else:
            columns = catalog.load(self.loss).columns_class  # whose options are no options of the call
            options_of_columns = {} if columns is None else options_of(columns)
            for name, value in self.options.items():
                if name not in options_of_columns:
                    arguments.append(f"{name}={shown(value)}")
        return f"create({', '.join(arguments)})"

    def brief(self) -> str:
        """The gain as README has it."""
        return of_readme(self.in_brief or self.gain)

    def measured(self) -> str:
        """The gain, and its cost."""
        return f"{self.gain}; R@10 {self.cost}" if self.cost else self.gain

    def before(self) -> str:
        """The command that computes the teacher's features."""
        return f"rankloss features {self.features} --data train.csv --output {FOLDER}"


def shown(value: Any) -> str:
    """A value as Python has it, with the quotes of this project, and whole numbers without ``.0``."""
    return re.sub(r"(\d)\.0\b", r"\1", repr(value).replace("'", '"'))


def typed(option: Any, value: Any) -> str:
    """A value as a command line has it."""
    return f"{value:g}" if isinstance(value, float) else str(option.spelled(value))


OF_ENCODERS = ("+9.39 (8.30 to 10.47)", "+6.26 (5.66 to 6.87)", "+7.97 (6.47 to 9.48)")
"""The gain of rankclip-encoders: icons, photographs, emojis."""

PAIRS = Case(
    "pictures with captions, and nothing else",
    "rankclip",
    gain="λ and rate tuned: icons in batches of 64 +4.19 (3.14 to 5.23), in 250 +1.99 (0.86 to 3.12), from "
    "71,680 +3.27 (1.32 to 5.23); photographs *−0.10 ± 0.46*, in 250 *+0.35 (−0.10 to 0.80)*; emojis "
    "*−0.29 (−1.76 to 1.17)*; without a teacher nowhere [shown above spread](evidence.md#spread-or-ranks). "
    "With the paper's λ: icons in batches of 64 *+0.51 ± 0.52* from 2,000 pairs, +2.53 ± 0.29 from 8,000, "
    "+2.60 ± 1.07 from 141,093, [no more than shuffled words "
    "gain](evidence_details.md#ranks-or-something-else); tuned heads on photographs −0.20 ± 0.13",
    page="evidence.md",
)
SPREAD = Case(
    "… by a term without ranks",
    "spread",
    gain="weight and rate tuned: icons in batches of 64 +4.40 (3.33 to 5.47), in 250 +5.16 (3.87 to 6.44), "
    "from 71,680 +4.05 (2.09 to 6.01); photographs *+1.07 ± 0.68*, in 250 +1.02 (0.67 to 1.37), with four "
    "times the epochs *−0.57 ± 1.05*; emojis *+0.17 (−1.59 to 1.93)*",
    in_brief="weight and rate tuned: icons in batches of 64 +4.40 (3.33 to 5.47); photographs "
    "*+1.07 ± 0.68*, in batches of 250 +1.02 (0.67 to 1.37); emojis *+0.17 (−1.59 to 1.93)*; "
    "[`--loss rankclip`, the paper's, is nowhere shown above it](evidence.md#spread-or-ranks)",
    page="losses.md#spread",
)
PRESET = Case(
    "… and two small encoders that pip installs",
    "rankclip-encoders",
    gain="weight and rate tuned: icons in batches of 64 {0}, emojis {2}, photographs {1}; icons in batches "
    "of 250 with four times the epochs *+4.57 ± 1.54*, [not shown above spread](evidence.md#two-encoders); "
    "16 epochs of 35,840 icons: none shown, of 141,093 *−3.14 ± 1.03*".format(*OF_ENCODERS),
    page="teachers.md",
)
CAPTIONS = Case(
    "a sentence encoder, to rank the captions",
    "rankclip-in",
    {"lambda_in": 8.0, "top_k": 2},
    features=TEXTS,
    gain="icons +1.63 ± 0.35; photographs +1.38 ± 0.54 with other weights",
    on=("+1.63 ± 0.35", "+1.38 ± 0.54, with other weights", "–"),
    page="teachers.md",
)
REPEATED = Case(
    "repeated captions, such as class names",
    "clip-ids",
    gain="zero-shot top-1: +3.55 ± 0.67 on 2,478 icons, where 99 % of a batch have a partner, *+1.76 ± 1.29* "
    "on emojis with 91 %, nothing below 13 %",
    in_brief="zero-shot top-1 of icons: +3.55 ± 0.67, where 99 % of a batch have a partner; nothing below "
    "13 %",
    cost="icons +1.35 ± 0.59 where 47 % have one, else none shown",
    page="losses.md#repeated-and-several-captions",
)
SEVERAL = Case(
    "several captions of a picture, as rows",
    "clip-ids",
    {"key": "filepath"},
    gain="photographs: nothing, +0.05 ± 0.04",
    page="losses.md#repeated-and-several-captions",
)
NEGATIVES = Case(
    "hard negatives: wrong captions of each picture",
    "ranked-lists",
    {"own_caption": "top", "in_batch_negatives": True, "top_k": 1},
    gain="photographs, heads: accuracy +2.39 ± 0.48",
    cost="*−0.36 ± 0.43*",
    page="lists.md#hard-negatives",
)
GRADES_BY_RULE = Case(
    "grades by a rule that is the same for all",
    "ranked-lists",
    {"model": "pairwise", "weight": 4.0},
    gain="emojis, heads: nDCG@10 +4.57 ± 0.41",
    cost="+2.11 ± 0.94",
    page="lists.md",
)
GRADES = Case(
    "people's grades",
    "ranked-lists",
    {"model": "lambda", "weight": 0.25},
    gain="photographs, heads, at a learning rate of 0.0003: τ_c +1.96 ± 0.07",
    cost="−1.05 ± 0.34",
    page="lists.md",
)
PREFERENCES = Case(
    "preferences: one candidate before another",
    "ranked-lists",
    {"model": "pairwise", "weight": 0.5},
    gain="photographs with hard negatives, heads: accuracy +2.91 ± 0.51",
    cost="−1.99 ± 0.51",
    page="lists.md",
)
TEACHER = Case(
    "a better CLIP, as teacher",
    "mimicry",
    features=CLIP,
    gain="4 epochs of 35,840 icons, taught by a CLIP of icons: from 4.69 to 13.91, +9.22 ± 0.39; "
    "photographs, heads taught by wider heads: *+1.13 ± 0.63*, with weight 4",
    on=("+9.22 ± 0.39", "*+1.13 ± 0.63*, with weight 4", "–"),
    page="teachers.md",
)
TEACHER_AND_RANKS = Case(
    "… whose ranks shall count, too",
    "rankclip-distill+mimicry",
    features=CLIP,
    gain="icons +9.17 ± 0.48",
    on=("+9.17 ± 0.48", "*+1.15 ± 0.62*, with other weights", "–"),
    page="teachers.md",
)
ENCODERS = Case(
    "an image backbone and a sentence encoder",
    "rankclip-encoders",
    features=f"{IMAGES} {TEXTS} --align",
    gain="as with the two small encoders above",
    on=OF_ENCODERS,
    page="teachers.md",
)
BACKBONE = Case(
    "an image backbone",
    "rankclip-in",
    {"lambda_in": 8.0, "top_k": 8},
    features=IMAGES,
    gain="photographs *+0.82 ± 0.51*, τ_c +2.34 ± 0.54, with other weights",
    on=("–", "*+0.82 ± 0.51*, with other weights", "–"),
    page="teachers.md",
)
START = Case(
    "a CLIP to fine-tune, which shall keep what it can do",
    "mimicry",
    {"weight": 4.0},
    features=CLIP,
    gain="a CLIP of 30,000 icons, fine-tuned on emojis, keeps +8.64 ± 1.05 of the icons' R@10; heads of "
    "photographs, fine-tuned on dogs by NegCLIP's loss, weight 0.5: nothing shown, and a third of the "
    "learning rate without a teacher keeps 4.40 ± 0.82 more",
    cost="*+0.37 ± 2.01* of the emojis",
    on=("kept +8.64 ± 1.05", "–", "learned *+0.37 ± 2.01*"),
    page="teachers.md#fine-tuning-that-forgets-less",
)

CASES = (
    PAIRS,
    SPREAD,
    PRESET,
    CAPTIONS,
    REPEATED,
    SEVERAL,
    NEGATIVES,
    GRADES_BY_RULE,
    GRADES,
    PREFERENCES,
    TEACHER,
    TEACHER_AND_RANKS,
    ENCODERS,
    BACKBONE,
    START,
)
"""All, in the order of docs/losses.md."""


EXAMPLES = (
    ("open_clip.sh", "open_clip", PAIRS),
    ("transformers_trainer.py", "Hugging Face's Trainer", PAIRS),
    ("sentence_transformers_trainer.py", "sentence-transformers", PAIRS),
    ("lightning_module.py", "Lightning", PAIRS),
    ("accelerate_loop.py", "accelerate", PAIRS),
    ("plain_loop.py", "a loop of your own, with DDP", PAIRS),
    ("repeated_captions.sh", "open_clip", REPEATED),
    ("graded_lists.py", "Hugging Face's Trainer", GRADES_BY_RULE),
    ("two_encoders.py", "a loop of your own", ENCODERS),
    ("own_loss.py", "Hugging Face's Trainer", "a loss of your own"),
)
"""The files of examples/trainers: each with its trainer, and the case whose loss it trains, or its data."""


HAVE = {
    "a better CLIP, as teacher": TEACHER,
    "nothing but pairs, and two small encoders that pip installs": PRESET,
    "nothing but pairs, and no encoder": SPREAD,
}
"""What a reader of README has beside the pairs, and the loss for it."""

WANT = {
    "candidates in the order of people's grades": GRADES,
    "captions told from wrong ones (hard negatives)": NEGATIVES,
    "one candidate before another (preferences)": PREFERENCES,
    "fine-tuning that forgets less": START,
    "no negatives of equal captions, or with `--clip-ids-key COLUMN` of one product": REPEATED,
}
"""What a reader of README wants else than recall."""


def tables_of_readme() -> dict[str, str]:
    """The two tables of README: what the reader has, and what else the reader wants."""
    have = [(*_first_cells(words, case), case.brief()) for words, case in HAVE.items()]
    want = [(*_first_cells(words, case), case.brief(), of_readme(case.cost)) for words, case in WANT.items()]
    return {
        "have": table(("you have", "add to the command", "gain in R@10, points"), have),
        "want": table(("you want", "add to the command", "gain, points", "R@10, points"), want),
    }


def _first_cells(words: str, case: Case) -> tuple[str, str]:
    """The first two cells of a row of README: words that lead to the case's page, and its command."""
    return f"[{words}](docs/{case.page})", f"`{case.command()}`"


def one_decimal(number: re.Match[str]) -> str:
    """A number rounded to one decimal as by hand: 0.25 becomes 0.3."""
    return str(Decimal(number[0]).quantize(Decimal("0.1"), ROUND_HALF_UP))


def of_readme(text: str) -> str:
    """Text of a gain with one decimal, and with links as README has them."""
    return re.sub(r"\]\((?=\w+\.md)", "](docs/", with_one_decimal(text))  # links to a page beside


def with_one_decimal(text: str) -> str:
    """Text whose numbers with two decimals are rounded."""
    return re.sub(r"(?<![\d.])\d+\.\d\d(?![\d.])", one_decimal, text)


def table_of_losses() -> str:
    """Every case: the options of a command line, the call, the gain."""
    rows = [
        (f"[{case.have}]({case.page})", f"`{case.command()}`", f"`{case.python()}`", case.measured())
        for case in CASES
    ]
    return table(("your data", "in a trainer", "in Python", "gain"), rows)


def table_of_teachers() -> str:
    """The cases with a teacher: how its features are computed, how one trains, the gains."""
    taught = (TEACHER, TEACHER_AND_RANKS, ENCODERS, CAPTIONS, BACKBONE, START)
    rows = [(case.have, f"`{case.before()}`", f"`{case.command()}`", *case.on) for case in taught]
    return table(("you have", "once", "train with", "icons", "photographs", "emojis"), rows)


def table_of_examples() -> str:
    """The files of examples/trainers."""
    rows = []
    for file, trainer, case in EXAMPLES:
        data, loss = (case.have, f"`{case.loss}`") if isinstance(case, Case) else (case, "–")
        rows.append((f"[`{file}`](trainers/{file})", trainer, data, loss))
    return table(("file", "trainer", "data", "loss"), rows)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


TABLES = {
    "docs/losses.md": table_of_losses,
    "docs/teachers.md": table_of_teachers,
    "examples/README.md": table_of_examples,
}


def section(name: str) -> re.Pattern[str]:
    """The part of a page between the markers of that name."""
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)


SECTION = section("cases")


def with_section(text: str, name: str, content: str) -> str:
    """The text of a page with other content between the markers of that name."""
    return section(name).sub(lambda _: content, text)  # a function: the content's backslashes stay


def pages() -> dict[Path, str]:
    """The pages that have tables of cases, with the tables as they should be."""
    texts = {}
    for name, table_of in TABLES.items():
        file = ROOT / name
        texts[file] = with_section(file.read_text(encoding="utf-8"), "cases", table_of())
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, content in tables_of_readme().items():
        text = with_section(text, name, content)
    texts[readme] = text
    return texts


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
