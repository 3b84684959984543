"""Mutation testing: one small fault at a time in a copy of the project, and the share that the tests notice.

    make mutants
    python tools/mutants.py --count 40 FILE … -- TEST …

A fault is a comparison, an arithmetic operation, a condition or a constant that is changed. The seed decides
which are drawn. The output folder keeps a line per mutant, so that an interrupted run goes on. The report
ends with the survivors, of which some change nothing that can be seen, and the share of those killed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_PAIRS = (
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.Add, ast.Sub),
    (ast.Mult, ast.Div),
    (ast.And, ast.Or),
)
_OPPOSITES: dict[type[ast.AST], type[ast.AST]] = {
    **dict(_PAIRS),
    **{second: first for first, second in _PAIRS},
}
_LEFT_OUT = ("annotation", "returns", "decorator_list", "exc", "msg")  # messages and types are not arithmetic


def sites(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that can be changed, always in the same order."""
    left_out = _left_out(tree)
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        operator = getattr(node, "op", None)
        if isinstance(node, ast.Compare):
            operator = node.ops[0]
        is_number = isinstance(node, ast.Constant) and type(node.value) in (int, float, bool)
        if type(operator) in _OPPOSITES or is_number or isinstance(node, (ast.If, ast.IfExp)):
            yield node


def _left_out(tree: ast.AST) -> set[int]:
    """The nodes, by their identity, in annotations, decorators and messages."""
    left_out = set()
    for parent in ast.walk(tree):
        for name in _LEFT_OUT:
            for part in _as_list(getattr(parent, name, None)):
                left_out.update(map(id, ast.walk(part)))
    return left_out


def _as_list(part: object) -> list[ast.AST]:
    """The nodes of a field, which holds one, several or none."""
    parts = part if isinstance(part, list) else [part]
    return [x for x in parts if isinstance(x, ast.AST)]


def mutate(node: ast.AST) -> None:
    """Change one node in place."""
    if isinstance(node, (ast.If, ast.IfExp)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            node.value = not value
        elif isinstance(value, int):
            node.value = value + 1
        else:
            assert isinstance(value, float)
            node.value = value / 2
    elif isinstance(node, ast.Compare):
        node.ops[0] = _OPPOSITES[type(node.ops[0])]()  # type: ignore[call-overload]
    else:
        node.op = _OPPOSITES[type(node.op)]()  # type: ignore[attr-defined]


def run(file: str, number: int, tests: list[str], tree: Path) -> dict[str, object]:
    """Test one mutant in a copy of the project at ``tree``, and return its record."""
    _copy_project(tree)
    module = ast.parse(Path(file).read_text())
    node = list(sites(module))[number]
    record = {"file": file, "site": number, "line": getattr(node, "lineno", 0), "before": _shown(node)}
    mutate(node)
    record["after"] = _shown(node)
    (tree / file).write_text(ast.unparse(ast.fix_missing_locations(module)))
    return {**record, "killed": not _pass(tests, tree)}


def _copy_project(tree: Path) -> None:
    """Copy the files of the project as git sees them, without examples and pictures."""
    shutil.rmtree(tree, ignore_errors=True)
    command = ["git", "ls-files", "-co", "--exclude-standard", ":!examples", ":!docs/assets"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for path in listed.splitlines():
        if os.path.exists(path):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tree / path)


def _pass(tests: list[str], tree: Path) -> bool:
    """True if tests pass in a copy of the project; a test that hangs, and a module that fails, do not."""
    path = os.pathsep.join(str(tree / folder) for folder in (".", "integrations", "tests"))
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=1200,
        )
    except subprocess.TimeoutExpired:
        return False
    has_failed_to_import = done.returncode == 2 or "while loading conftest" in done.stderr
    if done.returncode not in (0, 1) and not has_failed_to_import:  # pytest itself fails
        raise SystemExit((done.stdout + done.stderr)[-2000:])
    return done.returncode == 0


def _shown(node: ast.AST) -> str:
    """The source of a node, or of its condition, cut at 90 characters."""
    shown = node.test if isinstance(node, (ast.If, ast.IfExp)) else node
    return ast.unparse(shown)[:90]


def main() -> None:
    """Draw mutants, run those that have no line yet, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/mutants"))
    parser.add_argument("files", nargs="+", help="files to change; after -- the tests to run")
    words = sys.argv[1:]
    border = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:border])
    tests = words[border + 1 :]
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "mutants.jsonl"
    lines_of_log = log.read_text().splitlines() if log.exists() else []
    records = map(json.loads, lines_of_log)
    done = {(record["file"], record["site"]): record for record in records}
    pool = []
    for file in sorted(args.files):
        count = len(list(sites(ast.parse(Path(file).read_text()))))
        pool += [(file, number) for number in range(count)]
    random.Random(args.seed).shuffle(pool)
    drawn = pool[: args.count]
    for file, number in drawn:
        if (file, number) not in done:
            done[file, number] = record = run(file, number, tests, (args.output / "tree").resolve())
            with log.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
    for key in drawn:
        record = done[key]
        if not record["killed"]:
            print(f"survived: {record['file']}:{record['line']}  {record['before']}  →  {record['after']}")
    killed = sum(done[key]["killed"] for key in drawn)
    print(
        f"{killed} of {len(drawn)} mutants killed ({killed / max(len(drawn), 1):.0%}), of {len(pool)} places"
    )


if __name__ == "__main__":
    main()
