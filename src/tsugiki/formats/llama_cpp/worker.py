"""The process that runs llama.cpp: it answers its parent's requests one after another.

`python -m tsugiki.formats.llama_cpp.worker MEMORY`, with requests on standard input and answers
on standard output (`frames`). A file that makes llama.cpp abort ends this process and no other;
it cannot take more than MEMORY bytes of its own (mapped weights do not count) and it does not
outlive its parent. Knows nothing of architectures, quantisation mixes or what is compared.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tsugiki.formats.llama_cpp import frames, model, rows
from tsugiki.formats.llama_cpp.library import Callback, Library, LibraryProblem, Refused

PR_SET_PDEATHSIG = 1
LOG_WARN, LOG_CONTINUES = 3, 5  # ggml_log_level
LOG_LINES = 200  # a hostile file may cause any number

Verb = Callable[..., Iterator[tuple[dict[str, Any], Any]]]
VERBS: dict[str, Verb] = {
    "quantise rows": rows.quantise_rows,
    "quantise file": rows.quantise_file,
    "logits": model.logits,
    "switched": model.switched,
    "ends": model.ends,
    "tokenise": model.tokenise,
    "detokenise": model.detokenise,
    "generate": model.generate,
}


def main() -> None:
    """Serve until the parent closes its end."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = int(sys.argv[1])
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever the library prints is not an answer
    try:
        library = Library()
    except LibraryProblem as problem:
        frames.send(answers, {"library": str(problem)})
        return
    callback = _log_warnings(library)
    library.llama_backend_init()
    try:
        while True:
            header, payload = frames.receive(0)
            frames.send(answers, _answer(library, answers, header, payload))
    except (EOFError, BrokenPipeError):
        del callback


def _answer(
    library: Library, answers: int, header: dict[str, Any], payload: bytearray
) -> dict[str, Any]:
    """Send what a request yields; returns its last frame."""
    try:
        for answer, data in VERBS[header.pop("verb")](library, payload, **header):
            frames.send(answers, answer, data)
    except Refused as refused:
        return {"refused": str(refused), "about": refused.about}
    except MemoryError:
        return {"memory": True}
    except BrokenPipeError:
        raise
    except OSError as error:
        return {"errno": error.errno, "text": str(error)}
    return {"end": True}


def _watch(parent: int) -> None:
    """End with the parent, also where there is no PR_SET_PDEATHSIG."""
    ended = threading.Event()
    while os.getppid() == parent:
        ended.wait(1.0)
    os._exit(1)


def _log_warnings(library: Library) -> object:
    """Send llama.cpp's warnings to standard error, up to a limit; returns what must stay alive."""
    left, current = LOG_LINES, 0

    def log(level: int, text: bytes | None, _: object) -> None:
        nonlocal left, current
        current = current if level == LOG_CONTINUES else level
        if current >= LOG_WARN and left > 0 and text:
            left -= 1
            os.write(2, text[:500])

    callback = Callback(log)
    library.llama_log_set(callback, None)
    return callback


if __name__ == "__main__":
    main()
