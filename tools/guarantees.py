"""The page of guarantees: what the tests show, by the name of each. The site's build fills it in.

A test's name is a sentence, so that the sentences of the test files, under what each file is about, are the
mapping from what the users' pages say to the tests that show it. ``python tools/guarantees.py`` prints it.
"""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
PARTS = {  # folder of tests: what it is about, and the page that says what holds
    "": "The losses ([the method](method.md), [options](options.md), [time and memory](performance.md))",
    "conditions": "The losses under conditions of training: autocast, compilers, copies, odd inputs",
    "rankloss_triton": "The kernels ([on a GPU](gpu.md))",
    "gpu": "On a card ([on a GPU](gpu.md))",
    "rankloss_open_clip": "open_clip's trainer ([the page](open_clip.md))",
    "rankloss_trainers": "Other trainers ([Hugging Face](trainers.md), [the rest](trainers-more.md))",
    "rankloss_features": "A teacher's features ([the page](features.md))",
    "rankloss_baselines": "CyCLIP and ALIP",
    "examples": "The examples ([evidence](evidence.md))",
    "docs": "The documents",
    "benchmarks": "The benchmarks",
}


def page() -> str:
    """Markdown: a section per folder of tests, a paragraph per file, a line per test."""
    lines: list[str] = []
    for folder, title in PARTS.items():
        files = sorted((TESTS / folder).glob("test_*.py"))
        lines += [f"## {title}", ""] if files else []
        for file in files:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            about = (ast.get_docstring(tree) or "").partition("\n")[0]
            lines += [f"**`{file.relative_to(TESTS).as_posix()}`** {about}".rstrip(), ""]
            lines += [f"- {sentence(node)}" for node in tree.body if is_test(node)] + [""]
    return "\n".join(lines)


def is_test(node: ast.stmt) -> bool:
    """True if a statement of a test file is a test."""
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


def sentence(test: ast.stmt) -> str:
    """A test's name as a sentence; those that take minutes are marked."""
    assert isinstance(test, ast.FunctionDef)
    slow = any("slow" in ast.unparse(mark) for mark in test.decorator_list)
    return test.name.removeprefix("test_").replace("_", " ") + (" (slow)" if slow else "")


if __name__ == "__main__":
    print(page())
