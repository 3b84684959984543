"""One page lists the tests of every file as sentences."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_generated_page_has_every_test_file_and_its_tests_as_sentences() -> None:
    command = [sys.executable, ROOT / "tools/guarantees.py"]
    page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    files = [file.relative_to(ROOT / "tests").as_posix() for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(re.findall(r"^\*\*`(\S+)`\*\*", page, re.MULTILINE)) == sorted(files)
    assert "\n- the generated page has every test file and its tests as sentences\n" in page
