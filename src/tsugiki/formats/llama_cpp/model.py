"""A GGUF model in llama.cpp: logits in strict settings, token ids, greedy answers.

Runs in the worker process. Strict means fp32 keys and values, no flash attention, no repacked
weights, no GPU: what remains is the arithmetic of the file's own types. Knows nothing of what the
tokens mean or of what the logits are compared with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsugiki.formats.llama_cpp.library import F32, Batch, Library, Refused

# Tokens decoded at once: with 262,144 logits each, 256 MB of them.
BATCH = 256

Frame = tuple[dict[str, Any], Any]
NOWHERE = (ctypes.c_void_p * 1)(None)  # an empty list of devices: the CPU alone


def logits(
    library: Library,
    payload: bytearray,
    gguf: str,
    prompts: list[list[int]],
    lora: str | None,
    scale: float,
    threads: int,
) -> Iterator[Frame]:
    """For each prompt, frames of the logits (n, V) of its next n tokens."""
    with _model(library, gguf) as model:
        longest = max((len(prompt) for prompt in prompts), default=0)
        with _context(library, model, longest, threads) as context:
            context.lay(lora, scale)
            for number, prompt in enumerate(prompts):
                yield from context.run(prompt, {"prompt": number})


def switched(
    library: Library, payload: bytearray, gguf: str, prompt: list[int], lora: str, scale: float,
    threads: int,
) -> Iterator[Frame]:  # fmt: skip
    """Frames of one prompt's logits in one context: without the adapter, with it, taken off."""
    with _model(library, gguf) as model, _context(library, model, len(prompt), threads) as context:
        for number, adapter in enumerate((None, lora, None)):
            context.lay(adapter, scale)
            yield from context.run(prompt, {"prompt": number})


def generate(
    library: Library,
    payload: bytearray,
    gguf: str,
    prompts: list[list[int]],
    most: int,
    stop: list[int] | None,
    lora: str | None,
    scale: float,
    threads: int,
) -> Iterator[Frame]:
    """For each prompt, one frame: the likeliest tokens after it, and which token ended them."""
    with _model(library, gguf) as model:
        vocabulary = library.llama_model_get_vocab(model)
        longest = max((len(prompt) for prompt in prompts), default=0) + most
        with _context(library, model, longest, threads) as context:
            context.lay(lora, scale)
            for number, prompt in enumerate(prompts):
                context.begin(prompt)
                for begin in range(0, len(prompt), BATCH):
                    found = context.decode(prompt[begin : begin + BATCH], begin, every=False)
                answer: list[int] = []
                ended = None
                for place in range(len(prompt), len(prompt) + most):
                    token = int(found[-1].argmax())
                    if token in stop if stop else library.llama_vocab_is_eog(vocabulary, token):
                        ended = token
                        break
                    answer.append(token)
                    if len(answer) < most:
                        found = context.decode([token], place, every=False)
                yield {"prompt": number, "ids": answer, "stop": ended}, b""


def tokenise(
    library: Library, payload: bytearray, gguf: str, texts: list[str], add: bool, parse: bool
) -> Iterator[Frame]:
    """One frame with the token ids of each text."""
    with _model(library, gguf, vocabulary_only=True) as model:
        vocabulary = library.llama_model_get_vocab(model)
        found = []
        for text in texts:
            raw = text.encode("utf-8", errors="surrogateescape")
            room = len(raw) + 8  # at most a token a byte, and a few around
            while True:
                ids = (ctypes.c_int32 * room)()
                count = library.llama_tokenize(
                    vocabulary, raw, len(raw), ids, room, add, parse
                )  # fmt: skip
                if count >= 0:
                    break
                if -count <= room:
                    raise Refused(f"llama.cpp cannot tokenise a text of {len(raw)} bytes", "")
                room = -count
            found.append(list(ids[:count]))
        yield {"ids": found}, b""


def ends(library: Library, payload: bytearray, gguf: str) -> Iterator[Frame]:
    """One frame with the ids that end an answer."""
    with _model(library, gguf, vocabulary_only=True) as model:
        vocabulary = library.llama_model_get_vocab(model)
        count = library.llama_vocab_n_tokens(vocabulary)
        yield {"ids": [i for i in range(count) if library.llama_vocab_is_eog(vocabulary, i)]}, b""


def detokenise(
    library: Library, payload: bytearray, gguf: str, ids: list[list[int]], special: bool
) -> Iterator[Frame]:
    """One frame a text, its bytes as the payload (they need not be whole characters)."""
    with _model(library, gguf, vocabulary_only=True) as model:
        vocabulary = library.llama_model_get_vocab(model)
        for row in ids:
            _check_ids(row, library.llama_vocab_n_tokens(vocabulary))
            given = (ctypes.c_int32 * max(1, len(row)))(*row)
            room = 16 * len(row) + 16
            while True:
                text = ctypes.create_string_buffer(room)
                count = library.llama_detokenize(
                    vocabulary, given, len(row), text, room, False, special
                )  # fmt: skip
                if count >= 0:
                    break
                room = -count
            yield {}, text.raw[:count]


@contextmanager
def _model(library: Library, gguf: str, vocabulary_only: bool = False) -> Iterator[int]:
    params = library.llama_model_default_params()
    params.devices = NOWHERE
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    params.vocab_only = vocabulary_only
    model = library.llama_model_load_from_file(gguf.encode(errors="surrogateescape"), params)
    if not model:
        raise Refused("llama.cpp cannot load this model", gguf)
    try:
        yield model
    finally:
        library.llama_model_free(model)


@contextmanager
def _context(library: Library, model: int, length: int, threads: int) -> Iterator[_Context]:
    trained = library.llama_model_n_ctx_train(model)
    if length > trained:
        raise Refused(f"a prompt of {length} tokens is too long: the model takes {trained}", "")
    params = library.llama_context_default_params()
    params.n_ctx = max(1, length)
    params.n_batch = params.n_ubatch = min(BATCH, params.n_ctx)
    params.n_outputs_max_per_seq = 0  # no limit but the batch
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = 0  # off
    params.type_k = params.type_v = F32
    params.offload_kqv = params.op_offload = False
    context = library.llama_init_from_model(model, params)
    if not context:
        raise Refused("llama.cpp cannot make a context for this model", "")
    batch = library.llama_batch_init(params.n_batch, 0, 1)
    try:
        yield _Context(library, model, context, batch)
    finally:
        library.llama_batch_free(batch)
        library.llama_free(context)


class _Context:
    """One sequence of tokens and its past, and the adapter that lies over the model."""

    def __init__(self, library: Library, model: int, context: int, batch: Batch) -> None:
        self.library = library
        self.model = model
        self.context = context
        self.batch = batch
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def lay(self, lora: str | None, scale: float) -> None:
        """Lay an adapter over the model, or take off what lies there."""
        library, count = self.library, 0
        one, scales = (ctypes.c_void_p * 1)(None), (ctypes.c_float * 1)(scale)
        if lora is not None:
            one[0] = library.llama_adapter_lora_init(
                self.model, lora.encode(errors="surrogateescape")
            )
            if not one[0]:
                raise Refused("llama.cpp cannot load this adapter", lora)
            count = 1
        if library.llama_set_adapters_lora(self.context, one, count, scales) != 0:
            raise Refused("llama.cpp cannot use this adapter", lora or "")

    def run(self, prompt: list[int], about: dict[str, Any]) -> Iterator[Frame]:
        """Frames of the logits (n, V) of a prompt's next n tokens, from its first on."""
        self.begin(prompt)
        for begin in range(0, len(prompt), BATCH):
            found = self.decode(prompt[begin : begin + BATCH], begin, every=True)
            yield {**about, "begin": begin, "columns": self.vocabulary}, found

    def begin(self, prompt: list[int]) -> None:
        """Forget the past; a prompt follows."""
        if not prompt:
            raise Refused("a prompt without tokens has no logits", "")
        _check_ids(prompt, self.vocabulary)
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def decode(self, tokens: list[int], begin: int, every: bool) -> NDArray[np.float32]:
        """Logits (n, V) of all tokens, or (1, V) of the last; valid until the next call."""
        batch, last = self.batch, len(tokens) - 1
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = begin + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or i == last
        code = self.library.llama_decode(self.context, batch)
        if code != 0:
            raise Refused(f"llama.cpp failed to decode {len(tokens)} tokens (code {code})", "")
        rows = len(tokens) if every else 1
        place = ctypes.cast(
            self.library.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float)
        )
        return np.ctypeslib.as_array(place, (rows, self.vocabulary))


def _check_ids(ids: list[int], vocabulary: int) -> None:
    wrong = [i for i in ids if not 0 <= i < vocabulary]
    if wrong:
        raise Refused(f"token {wrong[0]} is outside the vocabulary of {vocabulary}", "")
