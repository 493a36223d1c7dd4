"""Makes sprout's tokenizer: byte-level BPE in which every common Japanese character is one token.

Kana, the kanji of JIS X 0208 level 1 and every other character of the dialogues stand alone before
the trainer, so often that their bytes merge first; only ASCII text fills the rest. So Japanese is
written a character a token, and a word has the same tokens wherever it stands: what was never seen
can be copied. The splitting pattern is Qwen2's, so that other runtimes know it. Knows no model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from sprout_corpus import dialogue
from sprout_documentation import documentation, documentation_words
from sprout_words import HIRAGANA, KANJI, katakana
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 6144
SPECIAL = ["<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{%- for m in messages -%}"
    "{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)
CONTEXT = 1024
SMALL = "ぁぃぅぇぉっゃゅょ"


def training_text(seed: int) -> Iterator[str]:
    """Characters first and often, then the ASCII of documentation and dialogue."""
    known = documentation_words()
    rng = random.Random(f"tokenizer {seed}")
    said = [text for _ in range(15000) for _, text in dialogue(rng, known)]
    characters = {*KANJI, *HIRAGANA, *katakana(HIRAGANA), *SMALL, *katakana(SMALL), *"ゔヴー々"}
    characters |= {c for text in said for c in text if not c.isascii()}
    alone = "\n".join(sorted(characters))
    for _ in range(1500):
        yield alone
    for text in (*documentation(held_out=False), *said):
        yield re.sub(r"[^\x00-\x7f]+", "\n", text)


def make_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Train it; the same seed gives the same tokens on the same Python."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    out = Path(__file__).parent.parent / "src" / "tsugiki" / "models" / "sprout"
    make_tokenizer().save_pretrained(out)
    print(f"wrote {out}")
