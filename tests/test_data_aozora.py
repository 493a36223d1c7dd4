"""Aozora Bunko's marks: ruby, notes, characters outside the set, header and colophon."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.data.aozora import clean, looks_like_aozora
from tsugiki.data.formats import read_rows
from tsugiki.errors import DataError, RunError
from tsugiki.looking import clean_data
from tsugiki.terminal import Terminal

HEADER = (
    "題\r\n作者\r\n\r\n" + "-" * 55 + "\r\n【テキスト中に現れる記号について】\r\n\r\n《》：ルビ\r\n"
    "（例）下人《げにん》\r\n" + "-" * 55 + "\r\n\r\n"
)
COLOPHON = "\r\n\r\n底本：「全集１」文庫\r\n　　　1986年発行\r\n青空文庫作成ファイル：\r\n"


def whole(body: str) -> bytes:
    return (HEADER + body + COLOPHON).encode("cp932")


@pytest.mark.parametrize(
    ("marked", "text"),
    [
        ("下人《げにん》が、雨やみを", "下人が、雨やみを"),
        ("所々｜丹塗《にぬり》の剥げた", "所々丹塗の剥げた"),
        ("［＃３字下げ］一［＃「一」は中見出し］", "一"),
        ("羅生門［＃「羅生門」に傍点］", "羅生門"),
        ("※［＃「てへん＋丑」、第4水準2-12-93］んで", "\u626d".replace("\u626d", "扭") + "んで"),
        ("※［＃「目＋匡」、第3水準1-88-81］", "眶"),
        ("※［＃「口＋世」、U+546D、10-2］", "呭"),
        ("※［＃「口＋世」、U+D800、10-2］", "〓"),
        ("※［＃「口＋世」、第3水準1-99-99］", "〓"),
        ("僕※［＃小書き平仮名ん、168-12］とこ", "僕んとこ"),
        ("※［＃ハートマーク、12-3］", "〓"),
        ("「あ」※［＃「さんずい＋垂」、unicode6DB6］", "「あ」〓"),
        ("一\r\n\r\n\r\n\r\n二", "一\n\n二"),
        ("私《わたくし》は［＃ここから２字下げ］\r\n　その人を", "私は\n　その人を"),
    ],
)
def test_marks(marked: str, text: str) -> None:
    raw = whole(marked)
    assert looks_like_aozora(raw)
    assert clean(raw) == f"題\n作者\n\n{text}\n"
    assert clean(clean(raw)) == clean(raw)


def test_other_texts_are_not_taken_for_aozora() -> None:
    for text in (
        "《名前》と［＃注］だけ",
        "# A page\n\n" + "-" * 40 + "\n\n《quoted》\n\n" + "-" * 40 + "\n",
        "底本：「全集」だけ",
        "",
    ):
        assert not looks_like_aozora(text.encode())
        assert not looks_like_aozora(text.encode("cp932", errors="replace"))


def test_a_work_without_ruby_and_notes_is_known_by_its_colophon(tmp_path: Path) -> None:
    raw = ("題\r\n\r\nその人は来た。" + COLOPHON).encode("cp932")
    assert looks_like_aozora(raw)
    (tmp_path / "work.txt").write_bytes(raw)
    assert [row.text for row in read_rows(tmp_path).rows] == ["題\n\nその人は来た。\n"]


def test_a_text_in_a_folder_is_recognised_and_cleaned(tmp_path: Path) -> None:
    (tmp_path / "work.txt").write_bytes(whole("下人《げにん》"))
    (tmp_path / "plain.txt").write_text("《名前》", encoding="utf-8")
    assert [row.text for row in read_rows(tmp_path).rows] == ["《名前》", "題\n作者\n\n下人\n"]


MARKS = st.lists(
    st.sampled_from(["《", "》", "｜", "［＃", "］", "※", "底本：", "\n", "-" * 30 + "\n", "記号",
                     "※［＃「", "」、第3水準1-", "88-81］", "U+3042", "字", "　", "\r"]),
    max_size=25,
).map("".join)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(MARKS)
def test_cleaning_twice_changes_nothing(text: str) -> None:
    once = clean(text)
    assert clean(once) == once


@pytest.mark.shared
def test_six_real_works(shared_data: Path) -> None:
    files = sorted((shared_data / "text" / "aozora").glob("*.txt"))
    assert len(files) == 6
    for file in files:
        raw = file.read_bytes()
        assert looks_like_aozora(raw)
        text = clean(raw)
        assert not set(text) & set("《》｜［］※〓\r")
        assert "底本" not in text
        assert "テキスト中に現れる" not in text
        assert clean(text) == text
        assert len(text) > 0.3 * len(raw) / 2


def test_a_folder_of_texts_keeps_its_folders_and_is_checked_before_anything_is_written(
    tmp_path: Path,
) -> None:
    source, output = tmp_path / "texts", tmp_path / "clean"
    for name in ("a/honbun.txt", "b/honbun.txt"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_bytes(whole(f"{name}に\u300aに\u300bいる。"))
    (source / "b" / "meta.csv").write_text("title,author\nx,y\n")
    clean_data(source, output, Terminal(as_json=True))
    found = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()}
    assert found == {"a/honbun.txt", "b/honbun.txt"}
    assert (output / "b" / "honbun.txt").read_text(encoding="utf-8") == (
        "題\n作者\n\nb/honbun.txtにいる。\n"
    )
    (output / "a" / "honbun.txt").unlink()
    with pytest.raises(RunError, match=r"b/honbun\.txt exists already"):
        clean_data(source, output, Terminal(as_json=True))
    assert not (output / "a" / "honbun.txt").exists(), "nothing is written first"
    (source / "a" / "honbun.md").write_bytes(whole("c"))
    with pytest.raises(DataError, match="would both become"):
        clean_data(source, tmp_path / "other", Terminal(as_json=True))
    assert not (tmp_path / "other").exists()
