"""`python -m benchmarks.prove [NAME …]`: the long proofs, one after the other, each in its process.

Each writes a dated file under benchmarks/results/, which docs/promises.md names and the suite
checks. Without names: all of them, which takes hours. Knows only their names.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# module → what it proves; those that need ../shared/data say so themselves
PROOFS = {
    "demo_controls": "the demo's score is learnt: base, examples, nearest row, shuffled, fresh",
    "kills": "50 kill −9 at random moments end in the same bytes",
    "real_data": "stories260K on three real sets, beside PEFT",
    "greedy": "stories260K goes on as its author publishes",
    "aozora": "five works train a tiny GPT-2, LoRA learns the sixth",
    "merge_memory": "a 6 GB merge in bounded memory, at the speed of a copy",
    "memory": "the planned memory of a run against its peak",
    "quantized_quality": "NF4 and int8 storage against 16 bits, stories260K on gsm8k",
    "int8_quality": "LoRA with int8 products against bf16, stories260K on gsm8k and wikisql",
    "gpu_compile": "every Triton kernel compiles for GPUs that are not here",
    "gguf_converter": "GGUF files equal the official converter's, tensor for tensor, key for key",
    "export_speed": "a 6 GB export as f16 in bounded memory, at the speed of a copy",
    "ollama_template": "Modelfiles render what training saw, run by Go",
    "quantise_mix": "quantised files are llama.cpp's own, byte for byte",
    "quantise_speed": "quantising is no slower than llama.cpp's own",
    "strict_logits": "our llama.cpp process gives llama-cpp-python's logits",
    "quants": "what each GGUF type costs on two trained models; writes docs/quants.md",
    "answers_end": "answers of the exported demo adapter end by the stop token in llama.cpp",
    "decoding": "a merged model decodes as fast as its base",
    "hostile_gguf": "10,000 damaged GGUF files are read or refused",
    "context": "a token costs more in longer contexts by attention alone",
    "attention": "compiled attention is faster than plain products and torch's own",
    "defaults_sweep": "bare `tsugiki train` against a sweep of rates and epochs",
}


def main() -> int:
    """Run what was named; the number of proofs that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PROOFS)}; default: all")
    asked = parser.parse_args().names or list(PROOFS)
    unknown = [name for name in asked if name not in PROOFS]
    if unknown:
        parser.error(f"unknown proof {', '.join(unknown)}; known: {', '.join(PROOFS)}")
    ended = {}
    for name in asked:
        print(f"── {name}: {PROOFS[name]}", flush=True)
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, check=False)
        ended[name] = done.returncode
        print(
            f"── {name}: {time.monotonic() - began:.0f} s, exit code {done.returncode}", flush=True
        )
    failed = [name for name, code in ended.items() if code]
    print(f"{len(ended) - len(failed)} of {len(ended)} proofs hold", *failed, sep="\n  failed: ")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
