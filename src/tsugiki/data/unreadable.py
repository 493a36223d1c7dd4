"""What a file is that cannot be read as it stands, and what to do about it.

Knows beginnings of files and encodings; reads no rows.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

from tsugiki.errors import DataError, did_you_mean

# How a file that is no text begins: what it is, and what to do.
PACKED = {
    b"PK\x03\x04": ("an Excel or ZIP file", "unpack it, or save it as CSV in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("an old Excel file", "save it as CSV in UTF-8"),
    b"\x1f\x8b": ("a gzip file", "gunzip it"),
    b"BZh": ("a bzip2 file", "bunzip2 it"),
    b"\xfd7zXZ": ("an xz file", "unxz it"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unzstd it"),
    b"%PDF": ("a PDF file", "give its text"),
    b"\x89PNG": ("an image", "give rows or text"),
    b"\xff\xd8\xff": ("an image", "give rows or text"),
    b"PAR1": ("a Parquet file", "name it .parquet"),
}


def refuse_packed(path: Path, suffix: str) -> None:
    """Raises DataError: a file that is no text, whatever its name says."""
    if suffix == ".parquet":
        return
    with open(path, "rb") as stream:
        begin = stream.read(6)
    for mark, (what, fix) in PACKED.items():
        if begin.startswith(mark):
            raise DataError(f"{path} is {what}, which is not read", fix=fix)
    if 0 in begin[:2]:
        raise DataError(
            f"{path} is UTF-16 without its mark, or no text", fix=_iconv("utf-16le", path)
        )


def to_utf8(path: Path) -> str:
    """A command that makes UTF-8 of a text file, by the encoding in which it reads as Japanese."""
    raw = path.read_bytes()[: 1 << 20]
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "save it anew as UTF-8"  # UTF-16 that does not hold together
    found = {name: text for name in ("cp932", "euc-jp") if (text := _japanese(raw, name))}

    def kana(name: str) -> tuple[int, int]:
        text = found[name]
        return len(re.findall("[ぁ-んァ-ヶ]", text)), -len(re.findall("[ｦ-ﾟ]", text))

    return _iconv(max(found, key=kana) if found else "latin1", path)


def _japanese(raw: bytes, name: str) -> str:
    """The text where it may be Japanese in this encoding, else ''.

    Letters with accents can be read as kanji too, then mostly with a plain letter as second byte;
    and of the other encoding's bytes many cannot be read at all.
    """
    text = raw.decode(name, errors="ignore")
    wide = [c.encode(name) for c in re.findall("[ぁ-んァ-ヶ一-鿿]", text)[:10_000]]
    high = sum(code[1] >= 0x80 for code in wide)
    lost = len(raw) - len(text.encode(name, errors="ignore"))
    return text if 4 * high > len(wide) > 8 * lost else ""


def _iconv(encoding: str, path: Path) -> str:
    made = shlex.quote(str(path.with_name(f"utf8-{path.name}")))
    return f"iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > {made}"


def elsewhere(path: Path) -> str:
    """What to do where there is no such file: a near name, a path of Windows, an address, or a
    link to nothing."""
    if path.is_symlink():
        return f"it is a link to {path.readlink()}, and nothing is there: mend the link"
    if re.match(r"(https?|hf|s3|gs):/", str(path)):
        return "download it first, and give the file"
    here = Path(str(path).replace("\\", "/"))
    near = [here] if here != path and here.exists() else []
    with contextlib.suppress(OSError):
        name = did_you_mean(here.name, [p.name for p in here.parent.iterdir()])
        near += [here.parent / name] if name else []
    return f"did you mean {near[0]}?" if near else "check the path of the data"
