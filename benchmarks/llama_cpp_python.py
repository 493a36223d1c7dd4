"""What llama-cpp-python does with a file, as an oracle: run by the Python of its private venv.

`PYTHON benchmarks/llama_cpp_python.py quantise JOBS.json` and
`PYTHON benchmarks/llama_cpp_python.py logits REQUESTS.json FOLDER`. Shares no code with tsugiki.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np


def quantise(jobs: str) -> None:
    """llama.cpp's own quantiser, once for each [source, target, ftype, threads] of a JSON file.

    Prints the seconds of each.
    """
    with open(jobs) as stream:
        asked = json.load(stream)
    seconds = []
    for source, target, file_type, threads in asked:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = file_type, threads
        began = time.monotonic()
        code = llama_cpp.llama_model_quantize(
            source.encode(), target.encode(), ctypes.byref(params)
        )  # fmt: skip
        assert code == 0, f"llama_model_quantize gave {code} for {source}"
        seconds.append(time.monotonic() - began)
    print(json.dumps(seconds))


def logits(requests: str, folder: str) -> None:
    """Strict logits of each {gguf, lora, scale, prompts, threads}: FOLDER/N.npy (sum of T, V)."""
    with open(requests) as stream:
        for number, asked in enumerate(json.load(stream)):
            np.save(f"{folder}/{number}.npy", _logits(asked))


def _logits(asked: dict[str, Any]) -> np.ndarray:
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(asked["gguf"].encode(), model_params)
    assert model, "no model"
    params = llama_cpp.llama_context_default_params()
    longest = max(len(prompt) for prompt in asked["prompts"])
    params.n_ctx = params.n_batch = params.n_ubatch = longest
    params.n_outputs_max_per_seq = longest
    params.type_k = params.type_v = 0
    params.flash_attn_type = 0
    params.n_threads = params.n_threads_batch = asked["threads"]
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, "no context"
    if asked["lora"]:
        adapter = llama_cpp.llama_adapter_lora_init(model, asked["lora"].encode())
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(asked["scale"])
        assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales) == 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(longest, 0, 1)
    found = []
    for prompt in asked["prompts"]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = len(prompt)
        for i, token in enumerate(prompt):
            batch.token[i], batch.pos[i] = token, i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
        assert llama_cpp.llama_decode(context, batch) == 0
        for i in range(len(prompt)):
            row = llama_cpp.llama_get_logits_ith(context, i)
            found.append(np.ctypeslib.as_array(row, (size,)).copy())
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.stack(found)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
