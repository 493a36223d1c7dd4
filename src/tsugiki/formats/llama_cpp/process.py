"""llama.cpp at arm's length: requests to a process that may die of a bad file without harm.

    with LlamaCpp(threads=2) as llama:
        ids = llama.tokenise(gguf, ["Once upon a time"])
        logits = llama.logits(gguf, ids)

The process starts with the first request and again after a crash; each failure is a typed error
that says what llama.cpp said. Needs the extra `[gguf]`. Imports no torch. Knows nothing of
architectures, quantisation mixes or what is compared.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tsugiki.errors import MemoryLimitError, ModelError, TsugikiError, UsageError
from tsugiki.files import as_disk_error, human_bytes
from tsugiki.formats.ggml_types import TYPES
from tsugiki.formats.gguf_file import open_gguf
from tsugiki.formats.llama_cpp import frames
from tsugiki.formats.llama_cpp.library import NEED, find_library
from tsugiki.supervise import memory_left

SILENCE = 600.0  # seconds without an answer, a prompt's or a chunk's
LEAST_MEMORY = 1 << 30  # bytes
SOURCES = Path(__file__).parents[3]


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens, and the token that ended it (None: it had no end)."""

    ids: list[int]
    stop: int | None


class LlamaCpp:
    """A llama.cpp process, open while the `with` block runs.

    Args:
        threads: of its arithmetic.
        memory: bytes that it may take besides mapped weights; None: what the machine has free.
        silence: seconds that it may work on one prompt or chunk before it counts as hung.
    """

    def __init__(
        self, threads: int, *, memory: int | None = None, silence: float = SILENCE
    ) -> None:
        self.threads = threads
        self.memory = memory
        self.silence = silence
        self._child: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def __enter__(self) -> LlamaCpp:
        require_library()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def quantise(self, values: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
        """What llama.cpp makes of these numbers; a large tensor may be given in parts, by rows.

        Args:
            values: float32 (…, columns); columns a multiple of the type's block.
            kind: a type that ggml quantises to without an importance matrix: Q4_K, F16 …

        Returns:
            uint8 (rows, bytes of a row).

        Raises:
            ModelError: the numbers are not finite, or not in the type's range.
            UsageError: `[gguf]` is not installed.
        """
        type_ = TYPES[kind]
        columns = values.shape[-1]
        assert columns % type_.block == 0, "the caller chooses a type that fits"
        given = np.ascontiguousarray(values, np.float32).reshape(-1, columns)
        request = {
            "verb": "quantise rows", "type": type_.code, "rows": len(given), "columns": columns,
            "threads": self.threads,
        }  # fmt: skip
        out = np.empty((len(given), type_.row_bytes(columns)), np.uint8)
        if given.size:
            for _, payload in self._ask(request, given):
                out = np.frombuffer(payload, np.uint8).reshape(out.shape)
        return out

    def quantise_file(self, source: Path, target: Path, jobs: list[list[Any]]) -> Iterator[int]:
        """Fill `target` from `source` (`rows.quantise_file`); yields bytes done, as they are.

        Raises:
            ModelError: numbers that are not finite; the tensor is named.
            DiskError: the disk is full.
        """
        request = {
            "verb": "quantise file", "source": str(source), "target": str(target), "jobs": jobs,
            "threads": self.threads,
        }  # fmt: skip
        for header, _ in self._ask(request, source=source, target=target):
            yield header["bytes"]

    def logits(
        self,
        gguf: Path,
        prompts: Sequence[Sequence[int]],
        *,
        lora: Path | None = None,
        scale: float = 1.0,
    ) -> list[NDArray[np.float32]]:
        """Logits after every token of every prompt, in llama.cpp's strictest arithmetic.

        Keys and values in fp32, no flash attention, no repacked weights, on the CPU; each prompt
        alone, from position 0.

        Args:
            prompts: token ids, used as they are.
            lora: an adapter in GGUF form, laid over the model times `scale`.

        Returns:
            float32 (T, V) a prompt.

        Raises:
            ModelError: files that are not whole or that llama.cpp refuses, prompts that are empty,
                longer than the model takes, or with ids outside its vocabulary.
        """
        return list(self.each_logits(gguf, prompts, lora=lora, scale=scale))

    def each_logits(
        self,
        gguf: Path,
        prompts: Sequence[Sequence[int]],
        *,
        lora: Path | None = None,
        scale: float = 1.0,
    ) -> Iterator[NDArray[np.float32]]:
        """As `logits`, one prompt at a time: only one array is in memory."""
        request = self._about(gguf, lora, scale) | {"verb": "logits", "prompts": _ids(prompts)}
        yield from self._joined(request, [len(prompt) for prompt in prompts], gguf)

    def switched(
        self, gguf: Path, prompt: Sequence[int], lora: Path, *, scale: float = 1.0
    ) -> tuple[NDArray[np.float32], ...]:
        """Logits (T, V) without an adapter, with it, and with it taken off again, in one context.

        Raises:
            ModelError: as `logits`.
        """
        (ids,) = _ids([prompt])
        request = self._about(gguf, lora, scale) | {"verb": "switched", "prompt": ids}
        return tuple(self._joined(request, [len(ids)] * 3, gguf))

    def _joined(
        self, request: dict[str, Any], lengths: Sequence[int], gguf: Path
    ) -> Iterator[NDArray[np.float32]]:
        """Each prompt's logits, put together of their frames."""
        found: NDArray[np.float32] | None = None
        for header, payload in self._ask(request, source=gguf):
            length, begin = lengths[header["prompt"]], header["begin"]
            if found is None:
                found = np.empty((length, header["columns"]), np.float32)
            piece = np.frombuffer(payload, np.float32).reshape(-1, header["columns"])
            found[begin : begin + len(piece)] = piece
            if begin + len(piece) == length:
                yield found
                found = None

    def generate(
        self,
        gguf: Path,
        prompts: Sequence[Sequence[int]],
        *,
        most: int,
        stop: Sequence[int] = (),
        lora: Path | None = None,
        scale: float = 1.0,
    ) -> list[Answer]:
        """The likeliest token after each, at most `most` of them, in the settings of `logits`.

        Args:
            stop: tokens that end an answer; none: those that the file itself calls an end.

        Raises:
            ModelError: as `logits`; prompt and answer together must fit the model.
        """
        request = self._about(gguf, lora, scale) | {
            "verb": "generate", "prompts": _ids(prompts), "most": most, "stop": list(stop),
        }  # fmt: skip
        return [Answer(h["ids"], h["stop"]) for h, _ in self._ask(request, source=gguf)]

    def tokenise(
        self, gguf: Path, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[list[int]]:
        """Token ids of each text, as llama.cpp's tokenizer of this file makes them.

        Args:
            add_special: put BOS and EOS where the file says so.
            parse_special: read special tokens in the text as such.
        """
        open_gguf(gguf)
        request = {
            "verb": "tokenise", "gguf": str(gguf), "texts": list(texts), "add": add_special,
            "parse": parse_special,
        }  # fmt: skip
        (found,) = [header["ids"] for header, _ in self._ask(request, source=gguf)]
        return [list(ids) for ids in found]

    def ends(self, gguf: Path) -> list[int]:
        """Ids that end an answer in llama.cpp, by the file's keys or by their texts."""
        open_gguf(gguf)
        request = {"verb": "ends", "gguf": str(gguf)}
        return [int(i) for header, _ in self._ask(request, source=gguf) for i in header["ids"]]

    def detokenise(self, gguf: Path, ids: Sequence[Sequence[int]], *, special: bool) -> list[bytes]:
        """The bytes that tokens stand for, special ones left out unless asked for."""
        open_gguf(gguf)
        request = {
            "verb": "detokenise", "gguf": str(gguf), "ids": _ids(ids), "special": special,
        }  # fmt: skip
        return [bytes(payload) for _, payload in self._ask(request, source=gguf)]

    def _about(self, gguf: Path, lora: Path | None, scale: float) -> dict[str, Any]:
        """What names a model; both files are looked at by our own reader first."""
        for path in (gguf, lora):
            if path is not None:
                open_gguf(path)
        return {
            "gguf": str(gguf), "lora": str(lora) if lora else None, "scale": scale,
            "threads": self.threads,
        }  # fmt: skip

    # ---- the process --------------------------------------------------------------------------

    def _ask(
        self,
        request: dict[str, Any],
        payload: Any = b"",
        source: Path | None = None,
        target: Path | None = None,
    ) -> Iterator[tuple[dict[str, Any], bytearray]]:
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        ended = False
        try:
            with contextlib.suppress(BrokenPipeError):  # the next read tells why
                frames.send(child.stdin.fileno(), request, payload)
            while True:
                header, data = frames.receive(child.stdout.fileno(), self.silence)
                if header.keys() & {"end", "refused", "memory", "errno", "library"}:
                    ended = True
                    break
                yield header, data
        except EOFError:
            raise self._crashed(request["verb"], source) from None
        except frames.Silence:
            raise ModelError(
                f"llama.cpp gave no answer for {self.silence:g} seconds",
                got=_subject(request["verb"], source),
            ) from None
        finally:
            if not ended:  # crashed, hung, or nobody reads on: the pipe is of no more use
                self._stop()
        if "end" not in header:
            raise self._failed(header, request["verb"], source, target)

    def _start(self) -> subprocess.Popen[bytes]:
        require_library()
        memory = self.memory if self.memory is not None else max(LEAST_MEMORY, memory_left())
        paths = [str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            # Threads that spin while they wait make a busy machine ten times slower.
            "OMP_WAIT_POLICY": "passive",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "GGML_NO_BACKTRACE": "1",  # it would start a debugger
        }
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _stop)
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "tsugiki.formats.llama_cpp.worker", str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
        )
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()
        if self._said is not None:
            self._said.close()
            self._said = None

    def _last_words(self) -> str:
        """What the process has said on standard error, which is then empty again."""
        if self._said is None:
            return ""
        self._said.seek(0)
        said = self._said.read(100_000).decode(errors="replace")
        self._said.seek(0)
        self._said.truncate()
        return said

    def _crashed(self, verb: str, source: Path | None) -> TsugikiError:
        """What an ended process means."""
        assert self._child is not None
        code = self._child.wait()
        said, what = self._last_words(), _subject(verb, source)
        if code == -signal.SIGKILL or _short_of_memory(said):  # the kernel's way to say so
            return _out_of_memory(what)
        how = f"signal {-code}" if code < 0 else f"code {code}"
        return ModelError(
            f"llama.cpp ended ({how}) {what}",
            got=_end_of(said),
            fix="the file is damaged, or of a kind that this llama.cpp does not know",
        )

    def _failed(
        self, header: dict[str, Any], verb: str, source: Path | None, target: Path | None
    ) -> TsugikiError:
        """What an answer that is no result means."""
        what = _subject(verb, source)
        if "library" in header:
            self._stop()  # it has ended
            if "failed to map" in header["library"]:
                return _out_of_memory(what)
            return UsageError(f"llama.cpp cannot be used: {header['library']}", fix=NEED)
        if "memory" in header or header.get("errno") == errno.ENOMEM:
            return _out_of_memory(what)
        if "errno" in header:
            error = OSError(header["errno"], header["text"])
            return as_disk_error(error, target or source or Path())
        why, about, said = header["refused"], header["about"], self._last_words()
        if why == "source":
            where = f" in {source}" if source else ""
            return ModelError(f"{about}{where} has numbers that are not finite")
        if why == "target":
            return ModelError(
                f"{about} has numbers that the type written cannot hold",
                fix="write bf16 or f32, which hold every number of bf16 and f32 models",
            )
        if _short_of_memory(said):
            return _out_of_memory(what)
        return ModelError(why, got=" / ".join(filter(None, [about, _end_of(said)])) or None)


def require_library() -> None:
    """Refuse early where the extra is not installed.

    Raises:
        UsageError: with the command that installs it.
    """
    if find_library() is None:
        raise UsageError("llama.cpp is needed for this, and it is not installed", fix=NEED)


def _short_of_memory(said: str) -> bool:
    """Whether llama.cpp, C++ or Python gave up for want of memory."""
    return any(word in said for word in ("bad_alloc", "MemoryError", "failed to allocate"))


def _end_of(said: str) -> str | None:
    """The last lines of a log, short enough for a message."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return " / ".join(lines[-3:])[:600] or None


def _ids(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[int(i) for i in row] for row in rows]


def _subject(verb: str, source: Path | None) -> str:
    return f"at {verb}" + (f" with {source}" if source else "")


def _out_of_memory(what: str) -> MemoryLimitError:
    return MemoryLimitError(
        f"the memory does not suffice for llama.cpp {what}",
        got=f"{human_bytes(memory_left())} free",
        fix="end other programs, then run it again",
    )
