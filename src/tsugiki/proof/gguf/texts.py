"""Steps 3 and 4 for GGUF: the vocabulary, token ids on nasty strings, the template, the stops.

The file is read by llama.cpp itself, the reference by the tokenizer that training saw (or, where
it is a file too, by llama.cpp). Knows no tensors.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from gguf.constants import TokenType
from tokenizers import Tokenizer

from tsugiki.data.chat import ChatFormat
from tsugiki.errors import DataError, ModelError
from tsugiki.formats.gguf_pieces import MODEL, read_pieces
from tsugiki.formats.gguf_tokenizer import Speech, tokenizer_metadata
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import Check, found
from tsugiki.proof.gguf.artefact import GgufArtefact
from tsugiki.proof.texts import STRINGS, TALKS, added_tokens, first_difference, ids_of, prompt_of

IDS, TEMPLATE = "3 token ids", "4 template"
STOPS = "tokens that end an answer"
SHAPING = (
    "model", "pre", "tokens", "token_type", "merges", "scores", "precompiled_charsmap",
    "add_space_prefix", "remove_extra_whitespaces",
)  # fmt: skip
TEMPLATE_KEY = "tokenizer.chat_template"
SHOWN = 40


def compare_tokens(
    reference: Artefact | GgufArtefact, file: GgufArtefact, llama: LlamaCpp | None
) -> list[Check]:
    """Every token, merge and score; then the ids of nasty strings, special tokens among them."""
    try:
        ours, notes = _vocabulary(reference)
    except ModelError as error:  # llama.cpp has no such tokenizer: the strings alone can tell
        ours, notes, whole = {}, [], False
        wrong = [str(error).split("\n")[0]]
    else:
        theirs, _ = _vocabulary(file)
        wrong = [line for key in SHAPING for line in _unlike(key, ours.get(key), theirs.get(key))]
        whole = not wrong and bool(notes)
    checks = [found(IDS, "vocabulary", wrong, max(1, len(ours)), "parts")]
    return [*checks, _compare_strings(reference, file, llama, whole)] if llama else checks


def compare_templates(
    reference: Artefact | GgufArtefact, file: GgufArtefact, llama: LlamaCpp | None
) -> list[Check]:
    """The ids of rendered conversations, and the tokens that end an answer."""
    theirs = file.file.metadata.get(TEMPLATE_KEY)
    known = set(llama.ends(file.file.path)) if llama else set()
    if isinstance(reference, GgufArtefact):
        same = reference.file.metadata.get(TEMPLATE_KEY) == theirs
        wrong = [] if same else [f"{TEMPLATE_KEY} is another text"]
        checks = [found(TEMPLATE, "chat template", wrong, 1, "texts")]
        a = set(llama.ends(reference.file.path)) if llama else known
        if a != known:
            wrong = [f"answers end with {sorted(known)}, the reference's with {sorted(a)}"]
        return [*checks, found(TEMPLATE, STOPS, wrong, 1, "sets")] if llama else checks
    ours, name = reference.chat(), "prompts of conversations"
    lost = [
        f"{ours.tokenizer.convert_ids_to_tokens(i)!r} ({i}) ends an answer, and not in the file"
        for i in ours.stop_ids
        if i not in known
    ]
    stops = [found(TEMPLATE, STOPS, lost, len(ours.stop_ids), "tokens")] if llama else []
    if theirs is None and not ours.tokenizer.chat_template and ours.name == "plain":
        return [Check(TEMPLATE, name, "no template on either side", "–", True), *stops]
    if theirs is None:
        line = f"the file has no {TEMPLATE_KEY}, the reference speaks {ours.name!r}"
        return [found(TEMPLATE, name, [line], 1, "templates"), *stops]
    return [_compare_prompts(ours, str(theirs), file, llama), *stops]


def _compare_prompts(
    ours: ChatFormat, template: str, file: GgufArtefact, llama: LlamaCpp | None
) -> Check:
    """Rendered by the file's template, read by llama.cpp, against what training saw."""
    tokenizer = copy.copy(ours.tokenizer)
    tokenizer.chat_template = template
    try:
        theirs = ChatFormat(tokenizer, "tokenizer", ours.date)
    except DataError as error:
        line = f"the file's template cannot be used: {str(error).splitlines()[0]}"
        return found(TEMPLATE, "prompts of conversations", [line], len(TALKS), "prompts")
    rendered = {
        talk: theirs.render(theirs.repair(talk)[0], answer_next=True)
        for talk in TALKS
        if not isinstance(prompt_of(theirs, talk), str)
    }
    texts = list(rendered.values())
    if llama is None:
        read = [ours.encode(text) for text in texts]
    else:
        read = llama.tokenise(file.file.path, texts, add_special=False, parse_special=True)
    ids = dict(zip(rendered, read, strict=True))
    wrong = []
    for talk in TALKS:
        a, b = prompt_of(ours, talk), ids.get(talk) or prompt_of(theirs, talk)
        if a != b and not (isinstance(a, str) and isinstance(b, str)):
            last = talk[-1].content[:20]
            wrong.append(f"{last!r} ({len(talk)} turns): {first_difference(a, b)}")
    return found(TEMPLATE, "prompts of conversations", wrong, len(TALKS), "prompts")


def _compare_strings(
    reference: Artefact | GgufArtefact, file: GgufArtefact, llama: LlamaCpp, whole: bool
) -> Check:
    added = _added(reference)
    strings = list(dict.fromkeys([*STRINGS, *added, *(f"a {t} b{t}c" for t in added)]))
    wrong: list[str] = []
    told: list[str] = []
    for special in (True, False):
        ours = _ids(reference, strings, special, llama)
        theirs = _ids(file, strings, special, llama)
        for text, a, b in zip(strings, ours, theirs, strict=True):
            line = f"{text[:SHOWN]!r}: {b[:12]}, the reference gives {a[:12]}"
            if a != b and line not in wrong:
                (told if _cannot_be_said(reference, text, a, whole) else wrong).append(line)
    if wrong or not told:
        return found(IDS, "nasty strings", wrong, len(strings), "strings")
    told = ["what GGUF cannot say of this tokenizer:", *dict.fromkeys(told)]
    figure = f"{len(told) - 1} of {len(strings)} strings differ"
    return Check(IDS, "nasty strings", figure, "told", True, tuple(told), float(len(told) - 1))


def _cannot_be_said(
    reference: Artefact | GgufArtefact, text: str, ids: list[int], whole: bool
) -> bool:
    """What llama.cpp has no place for: tokens without a row, normal forms, unigram's corners.

    whole: the vocabulary is the reference's, part for part, and hard texts are known to differ.
    """
    if isinstance(reference, GgufArtefact):
        return False
    if max(ids, default=0) >= (reference.embedding_rows() or 0):
        return True
    backend = reference.chat().tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    if state["model"]["type"] == "Unigram" or state["model"].get("byte_fallback"):
        return whole
    normalizer = backend.normalizer
    return bool(normalizer and normalizer.normalize_str(text) != text)


def _ids(
    artefact: Artefact | GgufArtefact, strings: Sequence[str], special: bool, llama: LlamaCpp
) -> list[list[int]]:
    if isinstance(artefact, GgufArtefact):
        return llama.tokenise(
            artefact.file.path, strings, add_special=special, parse_special=True
        )  # fmt: skip
    tokenizer = artefact.chat().tokenizer
    rows = [ids_of(tokenizer, text, special) for text in strings]
    # T5's kind puts EOS behind every text; a prompt that has ended gets no answer.
    end = ids_of(tokenizer, "a", special)[-1:] == [tokenizer.eos_token_id] and special
    return [row[:-1] if end else row for row in rows]


def _vocabulary(artefact: Artefact | GgufArtefact) -> tuple[dict[str, Any], list[str]]:
    """The parts that shape token ids: the file's, or those that GGUF has for the tokenizer.

    With notes on what llama.cpp reads otherwise than the tokenizer.
    """
    prefix = "tokenizer.ggml."
    if isinstance(artefact, GgufArtefact):
        known = artefact.file.metadata
        return {key: known[prefix + key] for key in SHAPING if prefix + key in known}, []
    tokenizer = artefact.chat().tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(f"the tokenizer of {artefact.name} is Python code")
    places = [artefact.stored.folder, *([artefact.changes.folder] if artefact.changes else [])]
    path = next((place / MODEL for place in places if (place / MODEL).is_file()), None)
    spm = path if bool(getattr(backend.model, "byte_fallback", False)) else None
    rows = artefact.embedding_rows() or len(tokenizer)
    said, notes = tokenizer_metadata(backend, rows, Speech({}), read_pieces(spm) if spm else None)
    return {key: said[prefix + key] for key in SHAPING if prefix + key in said}, notes


def _unlike(key: str, ours: Any, theirs: Any) -> list[str]:
    """Lines on one part of the vocabulary; none where it is the same."""
    if ours is None or theirs is None:
        if ours is None and theirs is None:
            return []
        absent = {"add_space_prefix": True, "remove_extra_whitespaces": False, "pre": "default"}
        if key in absent and (ours if theirs is None else theirs) == absent[key]:
            return []
        if key == "scores" and ours is None:
            return []  # byte-level BPE does not look at them
        return [f"{key}: {'missing' if theirs is None else 'not in the reference'}"]
    if isinstance(ours, str | bool):
        return [] if ours == theirs else [f"{key}: {theirs!r}, the reference has {ours!r}"]
    a, b = ([*ours], [*theirs])
    lines = []
    if len(a) != len(b):
        lines.append(f"{key}: {len(b):,}, the reference has {len(a):,}")
    if not isinstance(next(iter(a), ""), str):
        a, b = (np.asarray(x, np.float32).tolist() for x in (a, b))
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            lines.append(f"{_name(key)} {i}: {_shown(key, y)}, the reference has {_shown(key, x)}")
    return lines


def _name(key: str) -> str:
    return {"tokens": "token", "merges": "merge", "scores": "score of token",
            "token_type": "type of token"}.get(key, f"{key}, place")  # fmt: skip


def _shown(key: str, value: Any) -> str:
    if key == "token_type":
        names = {int(kind): kind.name for kind in TokenType}
        return str(names.get(int(value), int(value)))
    return repr(value) if isinstance(value, str) else f"{float(value):g}"


def _tokens(file: GgufArtefact) -> list[str]:
    return list(file.file.metadata.get("tokenizer.ggml.tokens", []))


def _added(artefact: Artefact | GgufArtefact) -> list[str]:
    if isinstance(artefact, Artefact):
        return added_tokens(artefact.chat().tokenizer)
    kinds = artefact.file.metadata.get("tokenizer.ggml.token_type", [])
    marked = (int(TokenType.CONTROL), int(TokenType.USER_DEFINED))
    return [t for t, kind in zip(_tokens(artefact), kinds, strict=False) if kind in marked]
