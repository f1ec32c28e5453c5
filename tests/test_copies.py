"""Blocks that stand in several scripts must not drift apart."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(script: str) -> dict[str, tuple[int, str, str]]:
    """Name -> (line, source, the line before) of every top-level function and class, decorators included."""
    source = (ROOT / f"{script}.py").read_text()
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = (first, "\n".join(lines[first - 1 : node.end_lineno]), lines[first - 2])
    return found


def drifted(scripts: list[str]) -> list[str]:
    """`file:line` of every marked copy that differs from its original, and of every unmarked copy."""
    all_blocks = {script: blocks(script) for script in scripts}
    problems = []
    for script, own in all_blocks.items():
        for name, (line, source, before) in own.items():
            marker = re.fullmatch(r"# Copied from (\w+)\.(\w+)", before)
            if marker and all_blocks[marker[1]].get(marker[2], (0, None))[1] != source:
                problems.append(f"{script}.py:{line} {name} differs from {marker[1]}.{marker[2]}")
            twins = [other for other in scripts if other != script and all_blocks[other].get(name, (0, 0))[1] == source]
            originals = [o for o in twins if not all_blocks[o][name][2].startswith("# Copied from")]
            if not marker and originals:
                problems.append(f"{script}.py:{line} {name} equals {originals[0]}.{name} without a marker")
    return problems


def test_copies_have_not_drifted():
    scripts = sorted(path.stem for path in ROOT.glob("*.py"))
    assert not drifted(scripts), "\n".join(drifted(scripts))
    markers = sum(path.read_text().count("# Copied from ") for path in ROOT.glob("*.py"))
    marked = sum(b[2].startswith("# Copied from") for script in scripts for b in blocks(script).values())
    assert markers == marked > 0  # every marker stands right above a function or class


def test_dvpo_and_ppo_sample_alike():
    """The rollout stands inline in both loops; the comparison rests on its being the same."""
    rollouts = []
    for script in ("train_dvpo", "train_ppo_baseline"):
        main = (ROOT / f"{script}.py").read_text().split("\ndef main(")[1]
        rollouts.append(main.split("# ---- 4 Rollout")[1].split("# ---- 5 Score")[0])
    assert rollouts[0] == rollouts[1]


def test_a_drifted_copy_is_found(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("def f():\n    return 1\n")
    (tmp_path / "b.py").write_text("# Copied from a.f\ndef f():\n    return 2\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert drifted(["a", "b"]) == ["b.py:2 f differs from a.f"]
