"""Reading GGUF without trust: good files give their numbers, lies give one named error."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_hostile import KINDS, mutants
from gguf_tiny import Tiny, write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.errors import ModelError
from tsugiki.formats.ggml_types import PLAIN, TYPES
from tsugiki.formats.gguf_file import GgufFile, open_gguf


def read_everything(path: Path) -> GgufFile:
    file = open_gguf(path)
    for key in file.metadata:
        assert file.metadata[key] is not None
    for name in file.tensors:
        file.raw(name)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_each_malformed_kind_is_named(kind: str, tmp_path: Path) -> None:
    content, words = KINDS[kind]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    if words is None:
        read_everything(path)
        return
    with pytest.raises(ModelError) as caught:
        open_gguf(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_mutants_are_read_or_refused(tmp_path: Path) -> None:
    """Never anything but a ModelError; none costs time or memory."""
    write_tiny(tmp_path / "good.gguf", Tiny(hidden=32, inner=32, layers=1))
    whole = (tmp_path / "good.gguf").read_bytes()
    path = tmp_path / "mutant.gguf"
    outcomes = {"read": 0, "refused": 0}
    slowest = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for mutant in mutants(whole, 300):
        path.write_bytes(mutant)
        began = time.process_time()
        try:
            read_everything(path)
            outcomes["read"] += 1
        except ModelError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
        slowest = max(slowest, time.process_time() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert min(outcomes.values()) > 20, outcomes
    assert grown < 200 << 10, f"{grown >> 10} MB"
    assert slowest < 2.0


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.gguf"):
        with pytest.raises(ModelError, match="there is no file"):
            open_gguf(path)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(KINDS["kv success"][0])
    found = open_gguf(path).metadata
    assert found["scalar.4"] == 7
    assert found["scalar.5"] == found["scalar.1"] == found["scalar.11"] == -7
    assert found["scalar.6"] == found["scalar.12"] == 0.5
    assert found["scalar.7"] is True
    assert found["array.7"].tolist() == [True] * 3
    assert found["array.11"].tolist() == [-7] * 3
    assert found["text"] == "猫"
    assert found["texts"] == ["a", "", "\udcff"]
    assert (found.kind("text"), found.kind("texts"), found.kind("array.6")) == (
        "str",
        "[str]",
        "[f32]",
    )
    assert "nothing" not in found
    assert found.get("nothing") is None


def quantised_example(name: str, random: np.random.Generator) -> tuple[Any, Any]:
    """Bytes of 3 rows of 2 blocks of a type, and the numbers that gguf-py gives for them."""
    code = gguf.GGMLQuantizationType(TYPES[name].code)
    values = random.standard_normal((3, 2 * TYPES[name].block)).astype(np.float32)
    try:
        raw = gguf.quantize(values, code)
    except NotImplementedError:  # K-quants: any bytes with tame scales are a block
        raw = random.integers(0, 60, (3, 2 * TYPES[name].nbytes), dtype=np.uint8)
    return raw, gguf.dequantize(raw, code)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
                                  "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])  # fmt: skip
def test_the_numbers_of_each_type(name: str, tmp_path: Path) -> None:
    raw, expected = quantised_example(name, np.random.default_rng(1))
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if name in PLAIN:
        writer.add_tensor("t", raw)
    else:
        writer.add_tensor("t", raw, raw_dtype=gguf.GGMLQuantizationType(TYPES[name].code))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert file.tensors["t"].type.name == name
    assert file.tensors["t"].shape == expected.shape
    assert file.values("t").dtype == np.float32
    np.testing.assert_array_equal(file.values("t"), expected)
    np.testing.assert_array_equal(file.values("t", 1, 2), expected[1:2])
    np.testing.assert_array_equal(
        file.raw("t").reshape(-1), np.asarray(raw).view(np.uint8).reshape(-1)
    )


def test_types_are_those_of_gguf_py() -> None:
    for kind in TYPES.values():
        # gguf-py still has Q8_1's size of 2023; no file holds that type
        if kind.code in iter(gguf.GGMLQuantizationType) and kind.name != "Q8_1":
            assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.code)] == (
                kind.block,
                kind.nbytes,
            )
            assert gguf.GGMLQuantizationType(kind.code).name == kind.name


def test_numbers_that_cannot_be_told(tmp_path: Path) -> None:
    from gguf_hostile import gguf as write
    from gguf_hostile import tensor

    path = tmp_path / "model.gguf"
    path.write_bytes(write(tensors=[tensor("t", [256], TYPES["Q8_K"].code)], data=bytes(292)))
    with pytest.raises(ModelError, match="type Q8_K"):
        open_gguf(path).values("t")


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text("abcdefgh._", min_size=1, max_size=20).filter(lambda k: k != "general.alignment"),
        st.one_of(
            st.integers(0, 2**32 - 1),
            st.text(max_size=20),
            st.lists(st.text(max_size=8), min_size=1, max_size=5),
        ),
        max_size=8,
    ),
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=5),
)
def test_what_gguf_py_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Any], shapes: list[list[int]]
) -> None:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in keys.items():
        if isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    arrays = {f"t{i}": np.random.default_rng(i).random(s, np.float32) for i, s in enumerate(shapes)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    # gguf-py leaves out empty strings
    assert {k: file.metadata[k] for k in keys if keys[k] != ""} == {
        k: v for k, v in keys.items() if v != ""
    }
    assert list(file.tensors) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.values(name), array)
