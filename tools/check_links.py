"""Requests every external link of the documents and of the package's metadata: ``make links``.

Needs the public web, so no test and no CI run depends on it. A link that is broken ends it with status 1; one
that cannot be reached from this machine, or whose server turns programs away, is only reported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "*.md",
    "*.ipynb",
    "*.cff",
    "*.yml",
    "*.yaml",
    "pyproject.toml",
    "rankloss/*.py",
    "integrations/*.py",
)

# Addresses that this project has chosen and that do not exist before it is published. Whoever publishes it
# replaces these prefixes in the documents by the real ones, and empties this list.
PLACEHOLDERS = ("https://github.com/rankloss/rankloss", "https://rankloss.github.io/rankloss")

OK, BROKEN, REFUSED, UNREACHABLE, PLACEHOLDER = "ok", "broken", "refused", "unreachable", "placeholder"
_MEANINGS = {
    OK: "answer",
    BROKEN: "do not exist",
    REFUSED: "are answered with an error that says nothing about the page",
    UNREACHABLE: "cannot be reached from this machine",
    PLACEHOLDER: "are placeholders",
}
_URL = re.compile(r"https?://[^\s<>\"'`\\\]})]+")
_GONE = {404, 410}
_TIMEOUT = 20  # seconds


def text_of(path: Path) -> str:
    """The text of a document; of a notebook what somebody wrote, without what its cells gave."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def links(text: str) -> set[str]:
    """The external links in a text, without the punctuation of the sentence around them."""
    return {url.rstrip(".,;:") for url in _URL.findall(text)}


def collect(root: Path = ROOT) -> dict[str, list[str]]:
    """The external links of all documents in the repository, each with the files that it is in."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *DOCUMENTS], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[str]] = {}
    for name in filter(None, listed.split("\0")):
        for url in links(text_of(root / name)):
            found.setdefault(url, []).append(name)
    return found


def is_placeholder(url: str) -> bool:
    """Whether a link is one of :data:`PLACEHOLDERS`, or below it."""
    return any(re.match(re.escape(prefix) + r"(?![\w-])", url) for prefix in PLACEHOLDERS)


def check(url: str) -> tuple[str, str]:
    """A verdict on a link, and why."""
    if is_placeholder(url):
        return PLACEHOLDER, ""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            return OK, str(answer.status)
    except urllib.error.HTTPError as error:
        return (BROKEN if error.code in _GONE else REFUSED), f"{error.code} {error.reason}"
    except (OSError, ValueError) as error:
        return UNREACHABLE, str(getattr(error, "reason", error))


def report(verdicts: Iterable[tuple[str, tuple[str, str]]], where: dict[str, list[str]]) -> int:
    """Print the verdicts, worst last, and give the exit status."""
    by_verdict: dict[str, list[str]] = {}
    for url, (verdict, reason) in sorted(verdicts):
        note = f" ({reason})" if reason else ""
        by_verdict.setdefault(verdict, []).append(f"  {url}{note}\n      in {', '.join(where[url])}")
    for verdict in (OK, PLACEHOLDER, UNREACHABLE, REFUSED, BROKEN):
        lines = by_verdict.get(verdict, [])
        if lines:
            print(f"{len(lines)} {_MEANINGS[verdict]}:", *lines, sep="\n")
    return 1 if by_verdict.get(BROKEN) else 0


def main() -> int:
    """Check all links."""
    where = collect()
    with ThreadPoolExecutor(8) as pool:
        return report(zip(where, pool.map(check, where), strict=True), where)


if __name__ == "__main__":
    sys.exit(main())
