"""Formulas of the docstrings in TeX."""

from __future__ import annotations

import ast
import re

from tools_folder import ROOT, tool

formulas = tool("site/formulas.py")


def test_no_sign_of_a_docstring_is_left_untranslated() -> None:
    blocks = []
    for path in (ROOT / "rankloss").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                head = re.split(r"^\w+:$", ast.get_docstring(node) or "", flags=re.MULTILINE)[0]
                blocks += re.findall(r"(?<=\n\n)(?: {4}.*\n?)+", head)
    assert len(blocks) >= 8
    for block in blocks:
        tex = formulas.to_tex(block)
        assert tex.isascii(), tex
        assert tex.count("{") == tex.count("}")
