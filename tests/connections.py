"""Real processes whose connections are recorded, as a user's that is not offline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def recorded(
    arguments: list[str], folder: Path, allowed: str = "", **more: str
) -> tuple[subprocess.CompletedProcess[str], set[str], int]:
    """Run Python with `arguments` in `folder`.

    Returns:
        How it ended; HOST:PORT of all that it and its children tried to reach, of which `allowed`
        alone can be reached; how many processes were recorded.
    """
    log = folder / "connections.log"
    log.unlink(missing_ok=True)
    ours = ("hf_hub_offline", "hf_endpoint", "http_proxy", "https_proxy", "all_proxy")
    kept = {key: value for key, value in os.environ.items() if key.lower() not in ours}
    path = [str(Path(__file__).parent / "recorder"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **kept, "PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HOME": str(folder / "home"),
        "TEST_CONNECTIONS": str(log), "TEST_ALLOWED": allowed, **more,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    lines = log.read_text().splitlines()
    tried = {line.removeprefix("tried ") for line in lines if line.startswith("tried ")}
    return done, tried, sum(line.startswith("records ") for line in lines)
