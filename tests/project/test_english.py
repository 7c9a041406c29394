"""Plain English: docstrings that say something, and none of the phrases that readers stumbled over."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    ROOT / "tarflow_sdk",
    ROOT / "export" / "tarflow_export",
    ROOT / "runtimes" / "tarflow_runtimes",
    ROOT / "benchmarks",
)
SOURCES = [
    path
    for folder in (
        ROOT / "tarflow_sdk",
        ROOT / "export",
        ROOT / "docs",
        ROOT / "benchmarks",
        ROOT / "examples",
        ROOT / "runtimes",
    )
    for path in sorted(folder.rglob("*"))
    if path.suffix in {".py", ".md", ".h", ".hpp", ".c", ".cpp"} and not {"tests", "build"} & set(path.parts)
] + sorted(ROOT.glob("*.md"))

BANNED = {
    r"\bhears?\b": "is called with",
    r"\bunless told\b|\bunless said\b": "by default",
    r"\btold (?:of|otherwise)\b": "called with, by default",
    r"\bcomes? back as (?:it is|they are)\b": "is returned unchanged",
    r"\bnobody (?:uses|holds|listens)\b|\bby nobody\b": "unused, unowned",
    r"\bthe ways? back\b(?! up)": "the backward pass, the inverse",
    r"\bnot known why\b|\bwhy is not known\b": "no diary",
    r"\bstdout is data\b|\bis talk\b": "results go to stdout, messages to stderr",
    r"\bgo(?:es)? on sequentially\b|\bwent on sequentially\b": "continues sequentially",
    r"\bhow to mend it\b|\bthat mends it\b": "how to fix it",
    r"\bfor ever\b|\bagain and again\b": "always, repeatedly",
    r"\bas it stands\b|\bas they stand\b": "unchanged",
    r"\bwhat (?:an?|the) \w+ is (?:opened|asked|fed|told)\b": "options, inputs",
}
"""Regular expressions, and what to write instead."""


def docstrings(path: Path) -> list[tuple[int, str]]:
    """Every string that stands alone, with its line: docstrings, and those of constants and attributes."""
    statements = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Expr))
    return [
        (node.lineno, node.value.value)
        for node in statements
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda folder: folder.name)
def test_docstrings_say_something(package: Path) -> None:
    found = [(path, line, text) for path in package.rglob("*.py") for line, text in docstrings(path)]
    assert len(found) > 50
    short = [f"{path}:{line}: {text!r}" for path, line, text in found if len(re.findall(r"[\w`.:/-]+", text)) < 3]
    assert not short, "\n".join(short)


def test_phrases_that_readers_stumble_over() -> None:
    assert len(SOURCES) > 150
    banned = re.compile("|".join(f"(?:{phrase})" for phrase in BANNED), re.IGNORECASE)
    found = [
        f"{path}: {match[0]!r}"
        for path in SOURCES
        for match in banned.finditer(re.sub(r"\s+(?:\*|//|#)?\s*", " ", path.read_text("utf-8")))
    ]
    assert not found, "\n".join(found)
