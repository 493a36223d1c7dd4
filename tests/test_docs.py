"""What the documents say is run: the README's Python, the table of learning rates, the links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tsugiki.config import LoraConfig
from tsugiki.defaults import full_learning_rate, lora_learning_rate

ROOT = Path(__file__).parent.parent


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    script = code[0].replace("src/tsugiki", str(ROOT / "src/tsugiki"))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()


def test_the_table_of_learning_rates() -> None:
    rows = re.findall(
        r"^\| (\d+) \| [^|]+ \| ([\d.e-]+) \| ([\d.e-]+) \|$",
        (ROOT / "docs" / "defaults.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 6
    for hidden, lora, full in rows:
        assert lora_learning_rate(int(hidden), LoraConfig()) == float(lora)
        assert full_learning_rate(int(hidden)) == float(full)


@pytest.mark.parametrize("hidden", [896, 1536, 2048, 3072, 4096])
def test_rates_of_real_models_are_between_1e_4_and_1e_3(hidden: int) -> None:
    assert 1e-4 <= lora_learning_rate(hidden, LoraConfig()) <= 1e-3


def test_the_rate_follows_the_scale() -> None:
    plain = lora_learning_rate(1024, LoraConfig(r=16, alpha=32))
    assert lora_learning_rate(1024, LoraConfig(r=64, alpha=32)) == plain, "not the rank"
    assert lora_learning_rate(1024, LoraConfig(r=16, alpha=64)) == pytest.approx(
        plain / 2, rel=0.02
    )


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if "://" not in target:
            assert (ROOT / target).exists(), target
