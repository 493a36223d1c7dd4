"""The first graft goes on: train, merge, export, verify, through the verbs, for eight families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_tiny
from test_proof_faults import TOKENIZER
from test_training_peft import ragged_rows
from typer.testing import CliRunner

import tsugiki
from tsugiki.cli import app
from tsugiki.models.hub import ResolvedModel
from tsugiki.models.load import load_base


@pytest.mark.parametrize("family", FAMILIES)
def test_train_merge_export_verify(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base", TOKENIZER)
    loaded = load_base(ResolvedModel(base, str(base)), dtype=torch.float32)
    tsugiki.attach(loaded.model, tsugiki.LoraConfig(r=4, targets="all-linear"))
    losses = tsugiki.train(loaded.model, ragged_rows(6), steps=6, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    adapter, merged, out = (tmp_path / name for name in ("adapter", "merged", "gguf"))
    tsugiki.save_adapter(loaded.model, adapter)
    runner = CliRunner()

    def run(*words: object) -> str:
        done = runner.invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.output

    model = ("--model", base)
    assert "equal in all" in run("merge", adapter, "--output", merged, *model)
    run("export", merged, "--gguf", "f32", "--output", out, "--no-verify")
    (file,) = out.glob("*.gguf")
    told = json.loads(run("verify", adapter, file, "--json", *model).splitlines()[-1])
    assert told["ok"]
    assert told["whole"]
