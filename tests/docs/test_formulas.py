"""Formulas of the docstrings in TeX."""

from __future__ import annotations

import ast
import re

import pytest
from tools_folder import ROOT, tool

formulas = tool("site/formulas.py")


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        ("½[C(S | R) + C(R | S)]", r"\tfrac{1}{2}[C(S \mid  R) + C(R \mid  S)]"),
        ("Σ_{q : y_q ≤ y_p} w(x_q)", r"\sum _{q : y_{q} \le  y_{p}} w(x_{q})"),
        ("w_s,k · w_k", r"w_{s,k} \cdot  w_{k}"),
        ("Σ_ij (v_i·t_j)²", r"\sum _{ij} (v_{i}\cdot t_{j})^{2}"),
        ("log C_p − ℓ_p", r"\operatorname{log} C_{p} - \ell _{p}"),
        ("√((P + X₀)(P + Y₀))", r"\sqrt{(P + X_{0})(P + Y_{0})}"),
        ("a,   b", r"a,\qquad b"),
        ("g where g < 1, else 1", r"g \;\text{where}\; g < 1, \;\text{else}\; 1"),
        ("a\nb", r"\begin{gathered}a\\[0.4em]b\end{gathered}"),
    ],
)
def test_signs_become_commands(text: str, tex: str) -> None:
    assert formulas.to_tex(text) == tex


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
