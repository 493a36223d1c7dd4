"""Compiles the bodies in C++ for this very CPU, once, where a C++ compiler is there.

The library is kept in the user's cache under a name made of source, command, compiler and CPU, so
a changed one is built anew and two machines with one home folder do not share it. Nothing needs
it: whatever goes wrong leaves the plain torch bodies, with the reason. Knows no operation.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch

from tsugiki.files import cache_folder

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]pp"))
SWITCH = "TSUGIKI_COMPILED"  # 0: never compile, always plain torch
MORE_FLAGS = "TSUGIKI_CXXFLAGS"  # for the compiler, after FLAGS
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-fopenmp", "-fPIC",
)  # fmt: skip
SECONDS = 120  # for a compiler that hangs


@lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled bodies, or None; and what was decided, for people."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0 asks for plain torch kernels"
    if not sys.platform.startswith("linux"):
        return None, "compiled kernels are built on Linux only"
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        return None, "no C++ compiler (c++, g++ or clang++); with one, steps get faster"
    try:
        return ctypes.CDLL(str(_built(shlex.split(found)))), f"compiled for this CPU by {found}"
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: a stray quote
        said = (getattr(error, "stderr", None) or "").strip() or str(error)
        more = os.environ.get(MORE_FLAGS)
        tool = f"{found} with {MORE_FLAGS}={more}" if more else found
        lines = said.splitlines()
        line = next((line for line in lines if "error" in line or "cannot find" in line), lines[-1])
        return None, f"{tool} could not build them: {line[:200]}"


def _built(compiler: list[str]) -> Path:
    """Path of the library, compiled now where it was not before."""
    command = [*compiler, *FLAGS]
    if platform.machine() == "x86_64":
        command.append("-mprefer-vector-width=512")
    version = _run([*compiler, "--version"])
    if "clang" in version:  # its `fast` joins a product with a sum even where the source forbids it
        command.append("-ffp-contract=on")
    command += shlex.split(os.environ.get(MORE_FLAGS, ""))
    # torch's own OpenMP: a second one would be a second set of threads on the same cores
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]
    texts = [source.read_text() for source in SOURCES]
    said = "\0".join([*texts, *command, *map(str, openmp), version, _processor()])
    name = hashlib.sha256(said.encode()).hexdigest()[:16]
    place = cache_folder("kernels") / f"bodies-{name}.so"
    seal = place.with_suffix(".sha256")  # loading a file cut short would end the process
    if not (place.exists() and seal.exists() and seal.read_text() == _digest(place)):
        units = [str(source) for source in SOURCES if source.suffix == ".cpp"]
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / "bodies.so"
            parts = [str(Path(folder) / f"{number}.o") for number in range(len(units))]
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda u, o: _run([*command, "-c", u, "-o", o]), units, parts))
            _run([*command, "-shared", *parts, "-o", str(made), *map(str, openmp)])
            written = Path(folder) / "seal"
            written.write_text(_digest(made))
            os.replace(made, place)
            os.replace(written, seal)
    return place


def _run(command: list[str]) -> str:
    """What it printed; subprocess's own errors where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    return done.stdout


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _processor() -> str:
    """What `-march=native` looks at."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kinds = ("model name", "flags", "Features", "CPU part")
        return "\n".join(sorted({x for x in lines if x.startswith(kinds)}))
    return platform.processor()
