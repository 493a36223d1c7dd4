"""Other people's programs in private folders, made when a proof first needs them.

They bring versions of their own, so they never enter the environment of tsugiki. They live in
`.oracles/` beside the sources, or where TSUGIKI_ORACLES says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LLAMA_CPP_PYTHON = "0.3.36"


def folder() -> Path:
    """Where the oracles are."""
    return Path(os.environ.get("TSUGIKI_ORACLES") or ROOT / ".oracles")


def llama_cpp_python() -> Path:
    """The Python of an environment with llama-cpp-python, built from source.

    The first call takes about seven minutes of one core and needs gcc and cmake. Built for the
    instruction sets of the prebuilt wheel: with others, sums in another order move the logits of
    quantised files by a tenth of their spread.
    """
    place = folder() / f"llama-cpp-python-{LLAMA_CPP_PYTHON}"
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        print(f"building llama-cpp-python {LLAMA_CPP_PYTHON} in {place} (minutes) …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        subprocess.run(
            ["nice", str(python), "-m", "pip", "install", "-q", "--no-cache-dir",
             "-c", str(ROOT / "constraints.txt"), f"llama-cpp-python=={LLAMA_CPP_PYTHON}"],
            check=True, env={**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=OFF"},
        )  # fmt: skip
        (place / "complete").touch()
    return python
