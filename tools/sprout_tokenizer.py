"""Makes sprout's tokenizer: byte-level BPE in which every common Japanese character is one token.

Kana and the kanji of JIS X 0208 level 1 are put before the trainer so often that their bytes merge
first; English and Japanese pieces of the corpus fill the rest. The splitting pattern is Qwen2's, so
that other runtimes know it. Knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from sprout_corpus import HIRAGANA, KANJI, dialogue, documentation, documentation_words, katakana
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
    """Characters first and often, then documentation and dialogue."""
    alone = "\n".join(
        [*KANJI, *HIRAGANA, *katakana(HIRAGANA), *SMALL, *katakana(SMALL), *"ゔヴー々、。「」・"]
    )
    for _ in range(1500):
        yield alone
    known = documentation_words()
    yield from documentation(held_out=False)
    rng = random.Random(f"tokenizer {seed}")
    for _ in range(15000):
        yield from (text for _, text in dialogue(rng, known))


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
