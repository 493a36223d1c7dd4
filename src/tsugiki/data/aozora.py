"""Aozora Bunko's text files → plain text.

cp932 with ruby 《》 and ｜, editor's notes ［＃…］, characters outside the set written as notes
(gaiji), a header between lines of hyphens and a colophon from 底本. (The format is described on
Aozora Bunko's own pages on 注記.) Knows nothing of training.
"""

from __future__ import annotations

import re

RULE = re.compile(r"^-{20,}\s*$", re.MULTILINE)
COLOPHON = re.compile(r"^\s*底本[：:]", re.MULTILINE)
MADE = re.compile(r"^(入力|校正|青空文庫作成ファイル)[：:]", re.MULTILINE)  # in a colophon
RUBY = re.compile(r"《[^《》\n]*》")
UNICODE_NOTE = re.compile(r"※［＃[^］]*?[Uu]\+([0-9A-Fa-f]{4,6})[^］]*］")
JIS_NOTE = re.compile(r"※［＃[^］]*?第[34]水準([12])-(\d{1,2})-(\d{1,2})[^］]*］")
KUTEN_NOTE = re.compile(r"※［＃[^］]*?、(\d{1,2})-(\d{1,2})-(\d{1,2})］")
NAMED_NOTE = re.compile(r"※［＃「([^」]{1,3})」[^］]*］")
KANA_NOTE = re.compile(r"※［＃小書き(?:平仮名|片仮名)(.)[^］]*］")
NOTE = re.compile(r"［＃[^］]*］")
MISSING = "〓"


def looks_like_aozora(raw: bytes) -> bool:
    """Whether a file is one of Aozora Bunko's.

    Ruby or notes, and a header rule or a colophon; without marks, a colophon that says who typed.
    """
    text = _decode(raw[: 1 << 20])
    if text is None:
        return False
    has_marks = "《" in text or "［＃" in text
    tail = text if len(raw) <= 1 << 20 else raw[-4096:].decode("cp932", errors="replace")
    colophon = COLOPHON.search(tail)
    if colophon is not None and MADE.search(tail, colophon.end()):
        return True
    return has_marks and (_header(text) is not None or colophon is not None)


def clean(raw: bytes | str) -> str:
    """The work's own text, without marks, header and colophon; doing it twice changes nothing."""
    text = raw if isinstance(raw, str) else (_decode(raw) or "")
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    while (cleaned := _without_marks(text)) != text:  # a mark may uncover another; each pass cuts
        text = cleaned
    return text


def _without_marks(text: str) -> str:
    header = _header(text)
    if header is not None:
        text = text[: header[0]] + text[header[1] :]
    colophon = COLOPHON.search(text)
    if colophon:
        text = text[: colophon.start()]
    text = UNICODE_NOTE.sub(lambda m: _character(int(m.group(1), 16)), text)
    text = JIS_NOTE.sub(lambda m: _kuten(*(int(g) for g in m.groups())), text)
    text = KUTEN_NOTE.sub(lambda m: _kuten(*(int(g) for g in m.groups())), text)
    text = NAMED_NOTE.sub(lambda m: m.group(1) if len(m.group(1)) == 1 else MISSING, text)
    text = KANA_NOTE.sub(r"\1", text)
    text = re.sub(r"※［＃[^］]*］", MISSING, text)
    text = NOTE.sub("", RUBY.sub("", text)).replace("｜", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _header(text: str) -> tuple[int, int] | None:
    """Where the block between two rules stands that explains the marks."""
    rules = list(RULE.finditer(text[:6000]))
    if len(rules) < 2 or "記号" not in text[rules[0].end() : rules[1].start()]:
        return None
    return rules[0].start(), rules[1].end()


def _character(code: int) -> str:
    return chr(code) if 0x20 <= code <= 0x10FFFF and not 0xD800 <= code < 0xE000 else MISSING


def _kuten(plane: int, row: int, cell: int) -> str:
    """A character of JIS X 0213 by plane, row and cell."""
    if not (1 <= row <= 94 and 1 <= cell <= 94):
        return MISSING
    code = bytes([row + 0xA0, cell + 0xA0])
    try:
        return ((b"\x8f" if plane == 2 else b"") + code).decode("euc_jis_2004")
    except UnicodeDecodeError:
        return MISSING


def _decode(raw: bytes) -> str | None:
    for encoding in ("utf-8-sig", "cp932"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError as error:
            if error.start > len(raw) - 4 and len(raw) > 64:  # cut inside a character
                return raw.decode(encoding, errors="ignore")
    return None
