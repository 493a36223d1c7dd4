"""The parts of training by themselves: rates, records, damage, spikes, report, all families."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from connections import recorded
from families import FAMILIES, save_tiny, tiny_model
from tokenizers_for_tests import CHATML, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tsugiki.adapters.attach import attach, detach
from tsugiki.adapters.storage import load_adapter, save_adapter
from tsugiki.config import LoraConfig, RunConfig, build_config
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import prepare
from tsugiki.data.formats import Rows
from tsugiki.data.row import Message, Row
from tsugiki.engine.engine import Engine, Request
from tsugiki.engine.sampling import Sampling
from tsugiki.errors import NonFiniteError
from tsugiki.models.hub import resolve_model
from tsugiki.models.isolation import probe_isolation
from tsugiki.models.load import load_base, load_tokenizer
from tsugiki.pipelines import run_training
from tsugiki.terminal import Terminal
from tsugiki.training import loop, metrics
from tsugiki.training.checkpoint import newest_whole, save_checkpoint
from tsugiki.training.report import write_report
from tsugiki.training.samples import choose_prompts
from tsugiki.training.schedule import learning_rate
from tsugiki.training.simple import train
from tsugiki.training.step import decay_groups
from tsugiki.training.watch import Watch


def test_rates_rise_then_fall() -> None:
    rates = [learning_rate(s, 100, 1.0, 0.1, "cosine") for s in range(1, 101)]
    assert rates[:10] == [pytest.approx(s / 10) for s in range(1, 11)]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-2
    linear = [learning_rate(s, 10, 1.0, 0.0, "linear") for s in range(1, 11)]
    assert linear == [pytest.approx(1 - s / 10) for s in range(10)]
    assert learning_rate(7, 10, 2.0, 0.3, "constant") == 2.0


def test_every_flip_and_every_cut_of_a_checkpoint_is_seen(tmp_path: Path) -> None:
    """200 byte flips and 100 truncations of the newest: 300 of 300 caught, the one before used."""
    tensors = {"weights.a": torch.arange(40.0)}
    for step in (3, 6):
        save_checkpoint(tmp_path, step, tensors, {"step": step, "identity": {}})
    rng = random.Random(0)
    names = ["tensors.safetensors", "state.json", "manifest.json"]
    for case in range(300):
        path = tmp_path / "step-6" / names[case % 3]
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        if case < 200:
            bad = bytearray(whole)
            bad[place] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
        else:
            path.write_bytes(whole[:place])
        found, notes = newest_whole(tmp_path)
        assert found is not None
        assert found.step == 3, (path.name, place)
        assert str(path.parent) in notes[0]
        path.write_bytes(whole)
    found, notes = newest_whole(tmp_path)
    assert found is not None
    assert (found.step, notes) == (6, [])


def test_a_disk_full_inside_the_tensors_is_told_as_one(tmp_path: Path) -> None:
    """The kernel refuses the write itself (a file-size limit), not a patched function."""
    code = (
        "import sys, torch\nfrom pathlib import Path\n"
        "from tsugiki.errors import DiskError\n"
        "from tsugiki.training.checkpoint import save_checkpoint\n"
        "try: save_checkpoint(Path(sys.argv[1]), 9, {'a': torch.zeros(200_000)}, {})\n"
        "except DiskError as error: print('told:', error.problem)\n"
    )
    save_checkpoint(tmp_path, 6, {"a": torch.zeros(3)}, {})
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert done.stdout.startswith("told: "), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-6"], "nothing half-written"
    found, _ = newest_whole(tmp_path)
    assert found is not None


def test_records_survive_a_torn_line_and_a_repeat(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        metrics.write(tmp_path, metrics.METRICS, 0, "train", step=step, loss=1.0)
    with open(tmp_path / metrics.METRICS, "a") as stream:
        stream.write('{"kind": "train", "segment": 0, "st')
    assert metrics.next_segment(tmp_path) == 1
    for step in (3, 4):
        metrics.write(tmp_path, metrics.METRICS, 1, "train", step=step, loss=2.0)
    kept = [(line["step"], line["loss"]) for line in metrics.read(tmp_path)]
    assert kept == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_spikes_are_caught_and_quiet_is_quiet() -> None:
    rng = random.Random(0)
    watch = Watch(100_000, RunConfig())
    for step in range(1, 10_001):
        said = watch.step(step, 5.0 - 4.0 * step / 10_000 + rng.gauss(0, 0.05))
        assert said == [], step
    assert "jumped" in watch.step(10_001, 1.0 + 10 * 0.05 + 0.1)[0]


def test_symptoms_are_told_once() -> None:
    flat = Watch(90, RunConfig())
    said = [text for step in range(1, 91) for text in flat.step(step, 3.0)]
    assert len(said) == 1
    assert "--learning-rate" in said[0]
    assert overfitting(RunConfig()).count("--learning-rate") == 1


def overfitting(config: RunConfig) -> str:
    watch = Watch(90, config)
    told = [text for loss in (3.0, 2.0, 2.1, 2.2, 2.3, 2.4) for text in watch.evaluated(loss)]
    assert len(told) == 1
    return told[0]


def test_advice_is_in_terms_of_the_run() -> None:
    """At the guide's own rate and rank it is the guide's advice, elsewhere the same part of them."""
    guide = build_config({"train": {"learning_rate": 5e-5}, "lora": {"r": 16}})
    watch = Watch(90, guide)
    said = next(text for step in range(1, 91) for text in watch.step(step, 3.0))
    assert "--learning-rate 0.0001, --lora-r 32 --lora-alpha 64" in said
    for words in ("--lora-dropout 0.1", "--learning-rate 3e-05", "--lora-r 8", "--epochs"):
        assert words in overfitting(guide)
    scaled = build_config({"lora": {"r": 16, "alpha": 128}})
    assert "--lora-r 8 --lora-alpha 64" in overfitting(scaled), "the scale stays"
    quick = build_config(
        {"train": {"learning_rate": 2.5e-3, "epochs": 1}, "lora": {"dropout": 0.2}}
    )
    assert "--learning-rate 0.0015" in overfitting(quick)
    assert "dropout" not in overfitting(quick)
    assert "--epochs" not in overfitting(quick)
    full = build_config({"train": {"learning_rate": 1e-4, "method": "full"}})
    assert "--lora" not in overfitting(full)


def test_the_report_escapes_and_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("note: <script>alert(1)</script>\n")
    (tmp_path / "decisions.json").write_text(json.dumps({"dtype": "<b>"}))
    metrics.write(tmp_path, metrics.METRICS, 0, "held_out", step=0, loss=2.5, best=True)
    for step in (1, 2):
        metrics.write(
            tmp_path, metrics.METRICS, 0, "train", step=step, loss=2.0 / step, lr=0.1, grad_norm=1.0
        )
    metrics.write(tmp_path, metrics.SAMPLES, 0, "sample", step=2, prompt="<i>", text="</pre>猫&")
    page = write_report(tmp_path, "stopped & <so>").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert "&lt;/pre&gt;猫&amp;" in page
    assert "2.5000" in page
    assert "stopped &amp; &lt;so&gt;" in page
    for absent in ("<script", "<i>", "<b>&lt;b", "http:", "https:", "src="):
        assert absent not in page, absent


def test_norms_and_biases_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    matrices, others = decay_groups(dict(model.named_parameters()), 0.1)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [p.dim() for p in matrices["params"]] == [2]
    assert [p.dim() for p in others["params"]] == [1, 1, 1]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_tiny("llama", folder / "model", tiny_tokenizer(CHATML))
    with open(folder / "rows.jsonl", "w") as stream:
        for i in range(30):
            stream.write(json.dumps({"prompt": f"count {i}", "completion": f"{i} done"}) + "\n")
    return folder


def run(small: Path, name: str, **train: object) -> Path:
    config = build_config(
        {
            "output": str(small / name),
            "model": {"name": str(small / "model"), "dtype": "float32"},
            "data": {"path": str(small / "rows.jsonl")},
            "train": {"max_steps": 6, "batch_size": 4, "eval_every": 2, "save_every": 2, **train},
        }
    )
    run_training(config, Terminal(as_json=True))
    return small / name


def test_full_fine_tuning_writes_a_model_that_loads(small: Path) -> None:
    folder = run(small, "full", method="full", learning_rate=1e-3)
    tuned = load_base(resolve_model(str(folder / "model")), dtype=torch.float32, device="cpu")
    plain = load_base(resolve_model(str(small / "model")), dtype=torch.float32, device="cpu")
    changed = [
        not torch.equal(a, b)
        for a, b in zip(tuned.model.parameters(), plain.model.parameters(), strict=True)
    ]
    assert any(changed)
    held = [x["loss"] for x in metrics.read(folder) if x["kind"] == "held_out"]
    assert min(held[1:]) < held[0]


ALONE = """
from tsugiki.cli import main
import sys
for words in (
    "train rows.jsonl --model model --output alone --max-steps 1 --dtype float32",
    "generate --adapter alone --max-tokens 3 hello",
):
    sys.argv = ["tsugiki", *words.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end
print("LOCAL", open("connections.log").read().count("tried"))
from tsugiki.errors import HubError
from tsugiki.models.hub import resolve_model
try:
    resolve_model("user/model")
except HubError as error:
    print("HUB", error.problem)
"""


def test_a_run_contacts_nothing(small: Path) -> None:
    """Not even the Hub, though nothing keeps it offline; a name of the Hub is seen to be tried."""
    done, tried, processes = recorded(["-c", ALONE], small)
    assert done.returncode == 0, done.stderr
    assert processes == 1
    assert "LOCAL 0\n" in done.stdout, "training and talking tried to reach something"
    assert (small / "alone" / "adapter").is_dir()
    assert "HUB " in done.stdout
    assert tried == {"huggingface.co:443"}


def test_a_whole_model_renders_and_ends_as_training_did(small: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "bare", tiny_tokenizer(None))
    config = build_config(
        {
            "output": str(tmp_path / "run"),
            "model": {"name": str(tmp_path / "bare"), "dtype": "float32"},
            "data": {"path": str(small / "rows.jsonl"), "template": "instruction-ja"},
            "train": {"max_steps": 1, "method": "full"},
        }
    )
    run_training(config, Terminal(as_json=True))
    trained = ChatFormat.of(load_tokenizer(resolve_model(str(tmp_path / "bare"))), "instruction-ja")
    found = ChatFormat.of(load_tokenizer(resolve_model(str(tmp_path / "run" / "model"))))
    asked = [Message("user", "count 3")]
    assert found.prompt_ids(asked) == trained.prompt_ids(asked)
    assert found.stop_ids == trained.stop_ids
    stored = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert stored["eos_token_id"] == list(trained.stop_ids)


def test_samples_are_asked_as_training_renders_them() -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = ChatFormat.of(tiny_tokenizer(template))
    talk = (Message("user", "what time is it?"), Message("assistant", "noon"))
    row = Row(talk, None, "a:1", tools=({"name": "clock"},))
    rows = Rows([row], [], "messages", 1)
    (prompt,) = choose_prompts((), prepare(rows, chat, max_length=512), chat)
    (example,) = chat.examples(row)
    assert prompt.ids == example.ids[: len(prompt.ids)]
    assert example.labels[len(prompt.ids) - 1] == -100
    assert example.labels[len(prompt.ids)] != -100


def test_early_stopping_holds_over_a_resume(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "held_out_loss", lambda *_: 1.0)
    folder = run(small, "early", early_stopping=1)
    adapter = folder / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    stored = build_config(json_config(folder))
    result = run_training(stored, Terminal(as_json=True), resume=folder)
    assert result is not None
    assert result.steps == 2
    assert "early stopping" in result.stopped_by
    assert adapter.read_bytes() == before


def json_config(folder: Path) -> dict[str, object]:
    from tsugiki.config import read_yaml

    return read_yaml(folder / "config.yaml")


def test_a_held_out_loss_that_is_nan_stops(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([2.0, float("nan")])
    monkeypatch.setattr(loop, "held_out_loss", lambda *_: next(values))
    with pytest.raises(NonFiniteError, match="held-out loss of step 2"):
        run(small, "nan")
    assert (small / "nan" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_saves_loads_and_answers(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model", tiny_tokenizer(CHATML))
    base = load_base(resolve_model(str(folder)), dtype=torch.float32, device="cpu")
    ask = Request((5, 9, 20, 31), sampling=Sampling(max_tokens=8), stop_ids=(1,))
    plain = [c.ids for c in Engine(base).complete([ask])]
    attach(base.model, LoraConfig(r=4), generator=torch.Generator().manual_seed(0))
    rows = [([5, 9, 20, 31, *[60] * 8], [-100] * 4 + [60] * 8)] * 4
    losses = train(base.model, rows, steps=20, learning_rate=1e-2)
    assert losses[-1] < 0.5 * losses[0]
    tuned = [c.ids for c in Engine(base).complete([ask])]
    assert tuned != plain
    save_adapter(base.model, tmp_path / "adapter")
    detach(base.model)
    assert [c.ids for c in Engine(base).complete([ask])] == plain
    load_adapter(base.model, tmp_path / "adapter")
    assert [c.ids for c in Engine(base).complete([ask])] == tuned


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_plain_api_leaves_a_model_as_it_was(family: str) -> None:
    """Any transformers model, also one that would mix documents: the right loss, then usable."""
    if family == "bloom":
        config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=2, n_head=2, vocab_size=320)
        model = AutoModelForCausalLM.from_config(config).train()
    else:
        model = tiny_model(family).train()
    assert probe_isolation(model.config).holds is (family != "bloom")
    ids = torch.randint(4, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    rows = [
        (ids[0, :7].tolist(), [-100] * 3 + ids[0, 3:7].tolist()),
        (ids[0].tolist(), [-100, *ids[0, 1:].tolist()]),
    ]
    attach(model, LoraConfig(r=2))
    state = [(name, id(m), m.training) for name, m in model.named_modules()]
    attention = model.config._attn_implementation
    with torch.no_grad():
        model.eval()
        total = sum(
            torch.nn.functional.cross_entropy(
                model(torch.tensor([i])).logits[0, :-1], torch.tensor(labels[1:]), reduction="sum"
            )
            for i, labels in rows
        )
        model.train()
    losses = train(model, rows, steps=3, learning_rate=1e-2)
    assert losses[0] == pytest.approx(float(total) / (4 + 11), rel=1e-5)
    assert losses[-1] < losses[0]
    assert [(name, id(m), m.training) for name, m in model.named_modules()] == state
    assert model.config._attn_implementation == attention
    assert model(ids).logits.isfinite().all()


def test_a_second_ctrl_c_leaves_at_once() -> None:
    """The first is remembered for the loop, a repeat of SIGTERM too; handlers come back."""
    code = (
        "import os, signal\nfrom tsugiki.training.signals import Signals\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "with Signals() as s: pass\n"
        "assert signal.getsignal(signal.SIGINT) is before\n"
        "with Signals() as s:\n"
        "    for n in (15, 15): os.kill(os.getpid(), n)\n"
        "    print('first', s.received, flush=True)\n"
        "    os.kill(os.getpid(), 2)\n"
        "    print('not reached', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "first 15\n"), done.stderr
