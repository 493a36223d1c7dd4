"""The real llama.cpp in its process: logits, tokens, answers; crashes and limits become errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from gguf_hostile import KINDS as MALFORMED
from gguf_hostile import gguf, text
from gguf_tiny import ARCHITECTURES, VOCABULARY, Tiny, write_lora, write_tiny

from tsugiki.errors import MemoryLimitError, ModelError, UsageError
from tsugiki.formats.ggml_types import TYPES
from tsugiki.formats.llama_cpp import library
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.formats.quantise import quantise_file

PROMPTS = [[1, 259, 265, 266], [1, *range(3, 40)], [5]]


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaCpp]:
    with LlamaCpp(threads=2) as process:
        yield process


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path, Tiny())
    return path


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def llama_by_hand(tensors: dict[str, np.ndarray], tiny: Tiny, ids: list[int]) -> np.ndarray:
    """Logits (T, V) of a Llama in float64, with rotary pairs as GGUF stores them."""
    t = {name: values.astype(np.float64) for name, values in tensors.items()}
    n, head = len(ids), tiny.hidden // tiny.heads

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    angle = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, head, 2) / head)
    turn = np.exp(1j * angle)[:, None, :]

    def rotate(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = t["token_embd.weight"][ids]
    mask = np.triu(np.full((n, n), -np.inf), 1)
    for i in range(tiny.layers):
        w = {name: t[f"blk.{i}.{name}.weight"] for name in (
            "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
            "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
        )}  # fmt: skip
        h = norm(x, w["attn_norm"])
        q = rotate((h @ w["attn_q"].T).reshape(n, tiny.heads, head))
        k = rotate((h @ w["attn_k"].T).reshape(n, tiny.groups, head))
        v = (h @ w["attn_v"].T).reshape(n, tiny.groups, head)
        k, v = (y.repeat(tiny.heads // tiny.groups, 1) for y in (k, v))
        p = softmax(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head) + mask)
        x = x + np.einsum("hqk,khd->qhd", p, v).reshape(n, -1) @ w["attn_output"].T
        h = norm(x, w["ffn_norm"])
        gate = h @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    return norm(x, t["output_norm.weight"]) @ t["output.weight"].T


def test_strict_logits_are_the_models(llama: LlamaCpp, tmp_path: Path) -> None:
    """Against the same Llama in float64 by hand: within rounding of fp32, whatever the length."""
    path, shape = tmp_path / "model.gguf", Tiny()
    tensors = write_tiny(path, shape, seed=3, spread=0.26)
    prompts = [[1, 259, 265, 266], [int(i) for i in np.random.default_rng(0).integers(0, 274, 256)]]
    for found, prompt in zip(llama.logits(path, prompts), prompts, strict=True):
        expected = llama_by_hand(tensors, shape, prompt)
        assert found.shape == expected.shape
        assert expected.std() >= 2
        assert np.abs(found - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_runs_and_takes_an_adapter(
    llama: LlamaCpp, arch: str, tmp_path: Path
) -> None:
    """Prompts alone equal prompts together; an adapter at scale 0 is the base, at 1 it is not."""
    path, lora = tmp_path / "model.gguf", tmp_path / "lora.gguf"
    tensors = write_tiny(path, Tiny(arch, tied=arch.startswith("gemma")), spread=0.29)
    write_lora(
        lora, arch, {n: w.shape for n, w in tensors.items() if w.ndim == 2 and "blk" in n}, 4
    )
    together = llama.logits(path, PROMPTS)
    for prompt, found in zip(PROMPTS, together, strict=True):
        np.testing.assert_array_equal(llama.logits(path, [prompt])[0], found)
    for same, found in zip(
        llama.logits(path, PROMPTS, lora=lora, scale=0.0), together, strict=True
    ):
        np.testing.assert_array_equal(same, found)
    for other, found in zip(llama.logits(path, PROMPTS, lora=lora), together, strict=True):
        assert np.abs(other - found).max() >= found.std() >= 2


def test_an_adapter_is_its_product(llama: LlamaCpp, tmp_path: Path) -> None:
    """W + scale·B·A in the file gives the logits of the adapter beside it."""
    import gguf as gguf_py

    path, lora = tmp_path / "model.gguf", tmp_path / "lora.gguf"
    tensors = write_tiny(path, Tiny())
    name = "blk.1.ffn_down.weight"
    write_lora(lora, "llama", {name: tensors[name].shape}, 4)
    parts = {t.name: t.data for t in gguf_py.GGUFReader(lora).tensors}
    merged = tensors | {
        name: tensors[name] + 0.7 * parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]
    }
    beside = llama.logits(path, PROMPTS, lora=lora, scale=0.7)
    for prompt, found in zip(PROMPTS, beside, strict=True):
        expected = llama_by_hand(merged, Tiny(), prompt)
        assert np.abs(found - expected).max() < 2e-5 * expected.std()


def test_tokens_both_ways(llama: LlamaCpp, tiny: Path) -> None:
    texts = ["the cat sat", "猫 <|end|>", ""]
    plain = llama.tokenise(tiny, texts, add_special=False, parse_special=False)
    assert plain[0] == [259, 265, 266, 259, 264, 263, 259, 269, 263]
    special = llama.tokenise(tiny, texts, add_special=True, parse_special=True)
    assert [ids[0] for ids in special] == [1, 1, 1]
    assert special[1][-1] == 273 != plain[1][-1]
    assert llama.detokenise(tiny, plain[:2], special=False) == [t.encode() for t in texts[:2]]
    assert llama.detokenise(tiny, [[1, 263, 273]], special=True) == [b"<s>at<|end|>"]
    assert llama.detokenise(tiny, [[1, 263, 273], []], special=False) == [b"at", b""]


def test_greedy_answers(llama: LlamaCpp, tiny: Path) -> None:
    """Each token is the likeliest by `logits`; stop tokens end an answer and are named."""
    answers = llama.generate(tiny, PROMPTS, most=12)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert (len(answer.ids) == 12) == (answer.stop is None)
        whole = llama.logits(tiny, [prompt + answer.ids])[0]
        assert list(whole.argmax(-1)[len(prompt) - 1 : -1]) == answer.ids
    stop = answers[0].ids[3]
    (short,) = llama.generate(tiny, PROMPTS[:1], most=12, stop=[stop])
    assert (short.ids, short.stop) == (answers[0].ids[: answers[0].ids.index(stop)], stop)


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K"]
)
def test_quantised_rows_stand_for_their_numbers(llama: LlamaCpp, kind: str) -> None:
    """Any number of rows, any thread count: the same bytes, close to what was given."""
    from gguf import GGMLQuantizationType, dequantize

    values = np.random.default_rng(0).standard_normal((7, 3, 512)).astype(np.float32)
    raw = llama.quantise(values, kind)
    assert raw.shape == (21, TYPES[kind].row_bytes(512))
    back = dequantize(raw, GGMLQuantizationType(TYPES[kind].code)).reshape(values.shape)
    slope = (back * values).sum() / (values * values).sum()
    assert 0.98 < slope <= 1.001
    with LlamaCpp(threads=1) as one:
        np.testing.assert_array_equal(one.quantise(values, kind), raw)
    np.testing.assert_array_equal(llama.quantise(values[2], kind), raw[6:9])
    assert llama.quantise(values[:0], kind).shape == (0, raw.shape[1])


def test_numbers_that_cannot_be_quantised(llama: LlamaCpp) -> None:
    values = np.ones((2, 256), np.float32)
    for bad, kind, words in (
        (np.nan, "Q4_K", "not finite"),
        (-np.inf, "Q8_0", "not finite"),
        (70000.0, "F16", "cannot hold"),
    ):
        values[1, 7] = bad
        with pytest.raises(ModelError, match=words):
            llama.quantise(values, kind)
    np.testing.assert_array_equal(
        llama.quantise(np.ones((1, 4), np.float32), "F32").view(np.float32), 1
    )


def test_what_is_asked_wrongly(llama: LlamaCpp, tiny: Path, tmp_path: Path) -> None:
    """Named, and the process still answers after."""
    for prompts, words in (
        ([[1], []], "without tokens"),
        ([[1, 274]], "token 274 is outside the vocabulary of 274"),
        ([[-1]], "token -1 is outside"),
        ([[1] * 257], "a prompt of 257 tokens is too long: the model takes 256"),
    ):
        with pytest.raises(ModelError, match=words):
            llama.logits(tiny, prompts)
    with pytest.raises(ModelError, match="too long"):
        llama.generate(tiny, [[1] * 250], most=10)
    with pytest.raises(ModelError, match="there is no file"):
        llama.logits(tmp_path / "none.gguf", [[1]])
    write_lora(tmp_path / "other.gguf", "llama", {"blk.0.attn_q.weight": (32, 64)}, 2)
    with pytest.raises(ModelError, match="cannot load this adapter") as caught:
        llama.logits(tiny, [[1]], lora=tmp_path / "other.gguf")
    assert "other.gguf" in str(caught.value)
    with pytest.raises(ModelError, match="cannot load this adapter"):
        llama.logits(tiny, [[1]], lora=tiny)
    assert llama.logits(tiny, []) == []
    assert llama.logits(tiny, [[1]])[0].shape == (1, 274)


def test_files_that_are_refused_or_that_abort(llama: LlamaCpp, tiny: Path, tmp_path: Path) -> None:
    """Malformed files do not reach llama.cpp; what kills it there is an error with its words."""
    path = tmp_path / "model.gguf"
    for content, words in MALFORMED.values():
        if words is not None:
            path.write_bytes(content)
            with pytest.raises(ModelError):
                llama.logits(path, [[1]])
    path.write_bytes(gguf([text("general.architecture") + b"\x08\0\0\0" + text("nothing")]))
    with pytest.raises(ModelError, match="cannot load this model") as caught:
        llama.logits(path, [[1]])
    assert "unknown model architecture: 'nothing'" in str(caught.value)
    # LoRA on the embeddings of a tied model: an assertion in ggml ends the process.
    write_tiny(path, Tiny(tied=True))
    write_lora(tmp_path / "lora.gguf", "llama", {"token_embd.weight": (VOCABULARY, 64)}, 2)
    with pytest.raises(ModelError, match=r"llama\.cpp ended"):
        llama.logits(path, [[1]], lora=tmp_path / "lora.gguf")
    assert llama.logits(tiny, [[1]])[0].shape == (1, 274)


def test_memory_and_time_have_limits(tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "wide.gguf"
    write_tiny(path, Tiny(hidden=256, inner=8192, layers=1))
    with LlamaCpp(threads=2, memory=300 << 20) as small, pytest.raises(MemoryLimitError):
        small.quantise(np.zeros((1 << 19, 256), np.float32), "Q8_0")
    with LlamaCpp(threads=2) as killed:  # as the kernel does where memory runs out
        killed.tokenise(path, [""], add_special=False, parse_special=False)
        assert killed._child is not None
        killed._child.kill()
        with pytest.raises(MemoryLimitError, match="memory does not suffice"):
            killed.logits(path, [[1]])
        assert killed.logits(path, [[1]])[0].shape == (1, 274)
    with LlamaCpp(threads=2, silence=0.02) as hasty, pytest.raises(ModelError, match="no answer"):
        hasty.logits(path, [[1] * 250])


def test_the_process_ends_with_its_parent(tiny: Path) -> None:
    """Killed with -9, the parent leaves nothing behind, even in the midst of work."""
    code = (
        "import sys, numpy as np\nfrom tsugiki.formats.llama_cpp.process import LlamaCpp\n"
        "llama = LlamaCpp(threads=1).__enter__()\n"
        "llama.tokenise(__import__('pathlib').Path(sys.argv[1]), [''], add_special=False, parse_special=False)\n"
        "print(llama._child.pid, flush=True)\n"
        "while True: llama.quantise(np.ones((4096, 1024), np.float32), 'Q4_K')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    os.kill(parent.pid, signal.SIGKILL)
    assert parent.wait() == -signal.SIGKILL
    parent.stdout.close()
    for _ in range(200):
        if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the process outlives its parent")


def test_without_the_extra_there_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "PACKAGE", "a_package_that_is_not_there")
    for attempt in (
        lambda: LlamaCpp(threads=1).__enter__(),
        lambda: LlamaCpp(threads=1).logits(tiny, [[1]]),
        lambda: quantise_file(tiny, tmp_path / "out.gguf", "q8_0", threads=1),
    ):
        with pytest.raises(UsageError, match="not installed") as caught:
            attempt()
        assert "pip install 'tsugiki[gguf]'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_version_is_refused() -> None:
    """One default that differs is enough: a layout is never guessed at."""
    params = library.ContextParams(**library.CONTEXT_DEFAULTS)
    library._check(params, library.CONTEXT_DEFAULTS)
    params.n_ubatch = 256
    with pytest.raises(library.LibraryProblem, match="n_ubatch of ContextParams is 256"):
        library._check(params, library.CONTEXT_DEFAULTS)
    with pytest.raises(library.LibraryProblem, match="cannot be loaded"):
        library.Library(Path(__file__))


def test_the_extra_alone_suffices() -> None:
    """Neither llama-cpp-python nor torch is imported, here or in the process; types are ggml's."""
    code = (
        "import sys, json\n"
        "import tsugiki.formats.quantise, tsugiki.formats.llama_cpp.worker\n"
        "from tsugiki.formats.llama_cpp.library import Library\n"
        "from tsugiki.formats.ggml_types import TYPES\n"
        "library = Library()\n"
        "sizes = {t.name: library.ggml_row_size(t.code, 512) for t in TYPES.values()}\n"
        "heavy = {'llama_cpp', 'torch', 'transformers', 'xllamacpp'} & set(sys.modules)\n"
        "print(json.dumps([sizes, sorted(heavy)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sizes, heavy = json.loads(done.stdout)
    assert heavy == []
    assert sizes == {t.name: t.row_bytes(512) for t in TYPES.values()}
