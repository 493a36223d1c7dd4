"""Sprout's held-out figures: bits per byte beside a 5-gram's and xz's, English and Japanese apart.

    python tools/sprout_baselines.py          print, and write the model card

English is documentation of modules that were never trained on; Japanese is dialogue drawn with
another seed, so every random word in it is new. The 5-gram is interpolated Kneser-Ney over sprout's
own tokens (Chen & Goodman 1999, one discount per order by Ney's formula), and another over bytes;
the better is the bar. xz's figure is what held-out text adds to the compressed training text.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
from sprout_corpus import dialogue, render
from sprout_documentation import (
    PACKAGES,
    documentation,
    documentation_words,
    package_documentation,
)
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

FOLDER = Path(__file__).parent.parent / "src" / "tsugiki" / "models" / "sprout"
ORDER = 5
HELD_SEED = "held out, never a shard's seed"


class FiveGram:
    """Interpolated Kneser-Ney over any hashable symbols."""

    def __init__(self, documents: list[list[int]], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        highest: Counter[tuple[int, ...]] = Counter()
        for document in documents:
            padded = [-1] * (ORDER - 1) + document
            highest.update(tuple(padded[i : i + ORDER]) for i in range(len(document)))
        self.counts: list[dict[tuple[int, ...], int]] = [highest]
        while len(self.counts) < ORDER:  # lower orders count different left neighbours
            self.counts.append(Counter(gram[1:] for gram in self.counts[-1]))
        self.totals: list[dict[tuple[int, ...], int]] = []
        self.followers: list[dict[tuple[int, ...], int]] = []
        self.discounts = []
        for grams in self.counts:
            total: dict[tuple[int, ...], int] = defaultdict(int)
            followers: dict[tuple[int, ...], int] = defaultdict(int)
            for gram, count in grams.items():
                total[gram[:-1]] += count
                followers[gram[:-1]] += 1
            self.totals.append(total)
            self.followers.append(followers)
            once = sum(1 for c in grams.values() if c == 1)
            twice = sum(1 for c in grams.values() if c == 2)
            self.discounts.append(once / max(1, once + 2 * twice))

    def probability(self, context: tuple[int, ...], symbol: int) -> float:
        """P(symbol | the last four symbols)."""
        p = 1 / self.vocabulary
        for level in range(ORDER - 1, -1, -1):
            history = context[level:]
            total = self.totals[level].get(history, 0)
            if total == 0:
                continue
            discount = self.discounts[level]
            own = max(self.counts[level].get((*history, symbol), 0) - discount, 0.0)
            p = (own + discount * self.followers[level][history] * p) / total
        return p

    def bits(self, documents: list[list[int]]) -> float:
        """Bits that the documents cost."""
        total = 0.0
        for document in documents:
            padded = [-1] * (ORDER - 1) + document
            for i, symbol in enumerate(document):
                total -= math.log2(self.probability(tuple(padded[i : i + ORDER - 1]), symbol))
        return total


def xz_bits(train: str, held: str) -> float:
    """Bits that held-out text adds to the training text under xz -9, its window over all of it."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 27}]
    primed = len(lzma.compress(train.encode(), format=lzma.FORMAT_XZ, filters=filters))
    both = len(lzma.compress((train + held).encode(), format=lzma.FORMAT_XZ, filters=filters))
    return 8.0 * (both - primed)


@torch.no_grad()
def model_bits(
    model: LlamaForCausalLM, documents: list[list[int]], start: int, context: int
) -> float:
    """Bits that the documents cost sprout, each after a document end; long ones in windows that
    overlap by half."""
    total = 0.0
    for document in documents:
        ids = [start, *document]
        begin = 0
        while begin < len(ids) - 1:
            window = torch.tensor([ids[begin : begin + context]])
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
            fresh = 0 if begin == 0 else context // 2 - 1
            total += float(losses[fresh:].sum()) / math.log(2)
            if begin + context >= len(ids):
                break
            begin += context // 2
    return total


def japanese(seed: str, count: int, known: list[str]) -> list[str]:
    """Dialogues with Japanese in them."""
    rng = random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        text = render(dialogue(rng, known))
        if sum(ord(c) > 0x3000 for c in text) > 0.2 * len(text):
            found.append(text)
    return found


def measure(
    train: list[str], held: list[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Bits per byte of every way to predict `held`."""
    model = LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    size = sum(len(text.encode()) for text in held)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def tokens(texts: list[str]) -> list[list[int]]:
        return [[*ids, end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def in_bytes(texts: list[str]) -> list[list[int]]:
        return [[*text.encode(), 256] for text in texts]

    held_tokens = tokens(held)
    by_token = FiveGram(tokens(train), len(tokenizer)).bits(held_tokens)
    by_byte = FiveGram(in_bytes(train), 257).bits(in_bytes(held))
    return {
        "sprout": model_bits(model, held_tokens, end, 1024) / size,
        "5-gram over tokens": by_token / size,
        "5-gram over bytes": by_byte / size,
        "xz -9 primed": xz_bits("\x00".join(train), "\x00".join(held)) / size,
        "held-out bytes": float(size),
        "training bytes": float(sum(len(text.encode()) for text in train)),
    }


def main() -> bool:
    """Measure, write the card, say whether sprout is below every bar."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    known = documentation_words()
    english = measure(
        [*documentation(held_out=False), *package_documentation()],
        list(documentation(held_out=True)),
        tokenizer,
    )
    other = measure(
        japanese("training dialogue", 60_000, known), japanese(HELD_SEED, 800, known), tokenizer
    )
    (FOLDER / "README.md").write_text(card(english, other), encoding="utf-8")
    print(json.dumps({"English": english, "Japanese": other}, indent=1))
    bars = ("5-gram over tokens", "5-gram over bytes", "xz -9 primed")
    return all(side["sprout"] < side[bar] for side in (english, other) for bar in bars)


def card(english: dict[str, float], other: dict[str, float]) -> str:
    """The model card, from the growth record and these figures."""
    growth = json.loads((FOLDER / "growth.json").read_text())
    curve = "\n".join(
        f"| {entry['tokens'] / 1e6:.1f} | {entry['loss']:.2f} | {entry['answers']:.2f} |"
        for entry in growth["curve"][:: max(1, len(growth["curve"]) // 16)]
    )
    rows = "\n".join(
        f"| {name} | {english[name]:.3f} | {other[name]:.3f} |"
        for name in ("sprout", "5-gram over tokens", "5-gram over bytes", "xz -9 primed")
    )
    return f"""# sprout

A practice model: small enough to live in the package, trained enough to learn from a few hundred
rows on a laptop's CPU. It chats a little, copies, picks and reorders words in English and Japanese.
It knows nothing of the world; do not ask it for facts, and do not build a product on it.

- **Shape**: Llama, {growth["parameters"]:,} parameters in bf16, tied embeddings, context 1,024,
  byte-level BPE of 6,144 tokens in which kana and every JIS level-1 kanji are single tokens.
- **Chat**: `<|system|>`, `<|user|>`, `<|assistant|>`, each turn ended by `<|end|>`, its stop token.
- **Data**: docstrings, comments and topics of Python's standard library (its licence, PSF, allows
  it), one module in twenty held out whole; in the second phase those of {", ".join(PACKAGES)}
  instead (Apache-2.0, BSD or MIT, as tsugiki's constraints pin them); and dialogue made by
  `tools/sprout_corpus.py`, drawn fresh for every shard, with words that never existed. The demo's
  task is in neither.
- **Recipe**: `{growth["command"]}`, {growth["tokens"] / 1e6:.1f} million tokens, seed
  {growth["seed"]}, {growth["seconds"] / 60:.0f} minutes on {growth["machine"]}
  (Python {growth["versions"]["python"]}, torch {growth["versions"]["torch"]}). Muon for the
  matrices, AdamW for the rest, cosine to 3 %. The first phase has windows of 256 tokens, 1,024 for
  its last part, and ends before its schedule does: read ten times and more, the library's
  documentation is known by heart, and held-out text gets worse. The second has 1,024 only.

## Held out, bits per byte

Of the weights whose SHA-256 is
`{hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()}`,
printed by `python tools/sprout_baselines.py`; English: {english["held-out bytes"]:,.0f} bytes of
documentation of held-out modules; Japanese: {other["held-out bytes"]:,.0f} bytes of dialogue with
new words. The 5-gram and xz had {english["training bytes"] / 1e6:.1f} MB and
{other["training bytes"] / 1e6:.1f} MB to learn from.

| | English | Japanese |
|---|---|---|
{rows}

## Growth

| million tokens | loss | loss on answers and documents |
|---|---|---|
{curve}
"""


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
