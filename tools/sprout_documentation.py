"""English text that sprout grows on: docstrings and comments of Python's library and of packages.

One module of the library in twenty is held out, whole. Knows no dialogue and no tokenizer.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_SHARE = 20  # one module in so many is never trained on
PACKAGES = ("huggingface_hub", "networkx", "numpy", "rich", "torch")


def documentation(*, held_out: bool) -> Iterator[str]:
    """Docstrings and comment blocks of the standard library, a module at a time.

    A module is held out by the hash of its name, whole.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = str(path.relative_to(root))
        if "site-packages" in name or "lib2to3/tests" in name or name.startswith("test/"):
            continue
        out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0
        if out != held_out:
            continue
        yield from module_texts(path)
    if not held_out:
        import pydoc_data.topics as topics

        yield from (text for _, text in sorted(topics.topics.items()))


def package_documentation() -> list[str]:
    """Docstrings and comment blocks of freely licensed packages that tsugiki itself brings.

    Each text once, the standard library's held-out texts never.
    """
    found = dict.fromkeys(
        text
        for name in PACKAGES
        for path in sorted((Path(sysconfig.get_paths()["purelib"]) / name).rglob("*.py"))
        for text in module_texts(path)
        if len(text) < 6000
    )
    for text in documentation(held_out=True):
        found.pop(text, None)
    return list(found)


def module_texts(path: Path) -> Iterator[str]:
    """Docstrings (dedented) and comment blocks of one file; nothing when it cannot be parsed."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                yield text
    block: list[str] = []
    try:
        with open(path, "rb") as stream:
            for token in tokenize.tokenize(stream.readline):
                if token.type == tokenize.COMMENT:
                    block.append(token.string.lstrip("# ").rstrip())
                elif token.type not in (tokenize.NL, tokenize.NEWLINE) and block:
                    if sum(map(len, block)) > 120:
                        yield "\n".join(block)
                    block = []
    except (tokenize.TokenError, SyntaxError):
        return


def documentation_words() -> list[str]:
    """Lower-case English words of the training documentation that occur at least five times."""
    counts: dict[str, int] = {}
    for text in documentation(held_out=False):
        for word in re.findall(r"[a-z]{3,11}", text):
            counts[word] = counts.get(word, 0) + 1
    return sorted(word for word, count in counts.items() if count >= 5)
