"""llama.cpp's C functions as the xllamacpp wheel exports them, with their structs checked.

The wheel is one shared object for Python that also exports the C API; no header comes with it, so
the layouts below are those of one version. Before anything is passed, the defaults that the
library itself fills in are compared with ours, byte by byte: another layout is refused, never
guessed at. Loads in the worker process only. Knows nothing of files or models.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from pathlib import Path
from typing import Any

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"  # its llama.cpp is build 11549
NEED = f"pip install 'tsugiki[gguf]'  # or: pip install {PACKAGE}=={VERSION}"
F32, F16, BF16 = 0, 1, 30  # ggml_type


class LibraryProblem(Exception):
    """The library is not there, cannot be loaded, or is not the version that is known here."""


class Refused(Exception):
    """What was asked cannot be done; `about` names the tensor or file."""

    def __init__(self, why: str, about: str) -> None:
        super().__init__(why)
        self.about = about


class ModelParams(ctypes.Structure):
    """struct llama_model_params."""

    _fields_ = (
        ("devices", POINTER(c_void_p)),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class ContextParams(ctypes.Structure):
    """struct llama_context_params; three pointers that are never set here stay unnamed."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("callbacks", c_void_p * 3),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class Batch(ctypes.Structure):
    """struct llama_batch."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


# What the pinned version's own defaults are, where they are not zero.
MODEL_DEFAULTS = {
    "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True,
}  # fmt: skip
CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1,
    "n_threads": 4, "n_threads_batch": 4, "rope_scaling_type": -1, "pooling_type": -1,
    "attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0, "type_k": 1, "type_v": 1, "offload_kqv": True, "no_perf": True,
    "op_offload": True, "swa_full": True,
}  # fmt: skip

# How each type's numbers are told: type code → function(stored, fp32, elements).
TO_FLOAT = {
    F16: "ggml_fp16_to_fp32_row", BF16: "ggml_bf16_to_fp32_row",
    2: "dequantize_row_q4_0", 3: "dequantize_row_q4_1", 6: "dequantize_row_q5_0",
    7: "dequantize_row_q5_1", 8: "dequantize_row_q8_0", 10: "dequantize_row_q2_K",
    11: "dequantize_row_q3_K", 12: "dequantize_row_q4_K", 13: "dequantize_row_q5_K",
    14: "dequantize_row_q6_K", 20: "dequantize_row_iq4_nl", 23: "dequantize_row_iq4_xs",
}  # fmt: skip
Callback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)  # ggml_log_callback
_TOKENS = POINTER(c_int32)
# name: (result, arguments)
SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "ggml_validate_row_data": (c_bool, (c_int32, c_void_p, c_size_t)),
    **dict.fromkeys(TO_FLOAT.values(), (None, (c_void_p, c_void_p, c_int64))),
    "ggml_row_size": (c_size_t, (c_int32, c_int64)),
    "llama_print_system_info": (c_char_p, ()),
    "llama_log_set": (None, (Callback, c_void_p)),
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_batch_init": (Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (c_void_p, (c_void_p,)),
    "llama_adapter_lora_init": (c_void_p, (c_void_p, c_char_p)),
    "llama_set_adapters_lora": (
        c_int32,
        (c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)),
    ),
    "llama_tokenize": (
        c_int32,
        (c_void_p, c_char_p, c_int32, _TOKENS, c_int32, c_bool, c_bool),
    ),
    "llama_detokenize": (
        c_int32,
        (c_void_p, _TOKENS, c_int32, c_void_p, c_int32, c_bool, c_bool),
    ),
}


def find_library() -> Path | None:
    """The shared object inside the installed wheel, or None; nothing is imported."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob(f"{PACKAGE}*.so")):
            return path
    return None


class Library:
    """The loaded library: each function of `SIGNATURES` as an attribute."""

    def __init__(self, path: Path | None = None) -> None:
        """Load and check.

        Raises:
            LibraryProblem: see the class.
        """
        path = path or find_library()
        if path is None:
            raise LibraryProblem(f"{PACKAGE} is not installed")
        self._loaded = _load(path)
        for name, (result, arguments) in SIGNATURES.items():
            try:
                function = getattr(self._loaded, name)
            except AttributeError:
                raise LibraryProblem(_other(f"it has no {name}")) from None
            function.restype, function.argtypes = result, list(arguments)
        _check(self.llama_model_default_params(), MODEL_DEFAULTS)
        _check(self.llama_context_default_params(), CONTEXT_DEFAULTS)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self._loaded, name)
        return function


def _load(path: Path) -> ctypes.CDLL:
    """Load it, with torch's OpenMP where the system has none."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        first = str(error)
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for openmp in sorted(Path(folder, "lib").glob("libgomp*.so*")):
            try:
                ctypes.CDLL(str(openmp), ctypes.RTLD_GLOBAL)
                return ctypes.CDLL(str(path))
            except OSError:
                continue
    raise LibraryProblem(f"{path.name} cannot be loaded: {first}")


def _check(filled: ctypes.Structure, expected: Mapping[str, object]) -> None:
    """Compare the library's defaults with the pinned version's, field by field."""
    for name, *_ in filled._fields_:
        value = getattr(filled, name)
        if isinstance(value, ctypes.Array):
            value = any(value)
        elif not isinstance(value, int | float):
            value = bool(value)  # a pointer
        if value != expected.get(name, 0):
            raise LibraryProblem(_other(f"{name} of {type(filled).__name__} is {value}"))


def _other(why: str) -> str:
    import importlib.metadata  # takes as long to import as the library to load

    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = "of no known version"
    return f"{PACKAGE} {version} is not the version {VERSION} that is known here: {why}"
