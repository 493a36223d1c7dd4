"""The part of Go's text/template that Modelfiles of ours use, run: an oracle for the tests.

Text, fields, variables of booleans, if / else / else if eq, range, strings. Real Go is asked by
`make prove`. Knows nothing of chat formats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)


def parse(text: str) -> list[Any]:
    """Nodes: ("text", s), ("do", words), ("if", [(words, body), …], else body), ("range", words, body)."""
    pieces = []
    at = 0
    for found in ACTION.finditer(text):
        if found.start() > at:
            pieces.append(("text", text[at : found.start()]))
        pieces.append(("action", found.group(1).strip()))
        at = found.end()
    if at < len(text):
        pieces.append(("text", text[at:]))
    nodes, rest = _block(pieces)
    assert not rest, rest
    return nodes


def _block(pieces: Sequence[tuple[str, str]]) -> tuple[list[Any], Sequence[tuple[str, str]]]:
    nodes: list[Any] = []
    while pieces:
        kind, value = pieces[0]
        if kind == "text":
            nodes.append((kind, value))
            pieces = pieces[1:]
        elif value == "end" or value.startswith("else"):
            return nodes, pieces
        elif value.startswith("range "):
            body, pieces = _block(pieces[1:])
            assert pieces[0][1] == "end"
            nodes.append(("range", value[6:], body))
            pieces = pieces[1:]
        elif value.startswith("if "):
            arms, last = [], None
            condition: str | None = value[3:]
            while True:
                body, pieces = _block(pieces[1:])
                if condition is None:
                    last = body
                else:
                    arms.append((condition, body))
                word = pieces[0][1]
                if word == "end":
                    break
                condition = word[8:] if word.startswith("else if ") else None
            nodes.append(("if", arms, last))
            pieces = pieces[1:]
        else:
            nodes.append(("do", value))
            pieces = pieces[1:]
    return nodes, pieces


def render(text: str, data: Mapping[str, Any]) -> str:
    """The template over .System, .Messages and so on."""
    return _run(parse(text), data, {})


def _run(nodes: Sequence[Any], dot: Any, variables: dict[str, Any]) -> str:
    out = ""
    for node in nodes:
        if node[0] == "text":
            out += node[1]
        elif node[0] == "range":
            for item in _value(node[1], dot, variables):
                out += _run(node[2], item, variables)
        elif node[0] == "if":
            for condition, body in node[1]:
                if _value(condition, dot, variables):
                    out += _run(body, dot, variables)
                    break
            else:
                out += _run(node[2] or [], dot, variables)
        else:
            assigned = re.fullmatch(r"(\$\w+) :?= (.+)", node[1])
            if assigned:
                variables[assigned.group(1)] = _value(assigned.group(2), dot, variables)
            else:
                out += str(_value(node[1], dot, variables))
    return out


def _value(words: str, dot: Any, variables: Mapping[str, Any]) -> Any:
    if words in ("true", "false"):
        return words == "true"
    if words[0] == '"':
        return json.loads(words)
    if words[0] == "$":
        return variables[words]
    if words.startswith("eq "):
        left, right = words[3:].split(" ", 1)
        return _value(left, dot, variables) == _value(right, dot, variables)
    assert re.fullmatch(r"\.\w+", words), words
    return dot[words[1:]]


def collate(messages: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What Ollama hands a template: all system turns together; turns of one role joined."""
    joined: list[dict[str, str]] = []
    for role, content in messages:
        if joined and joined[-1]["Role"] == role:
            joined[-1]["Content"] += "\n\n" + content
        else:
            joined.append({"Role": role, "Content": content})
    system = "\n\n".join(content for role, content in messages if role == "system")
    return {"System": system, "Messages": joined, "Response": ""}
