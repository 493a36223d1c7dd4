"""Which of llama.cpp's pre-tokenizers a byte-level BPE tokenizer has, found by how it splits.

llama.cpp knows pre-tokenizers by name, each a list of patterns in its code. A tokenizer is matched
by splitting the same hard text with each, so that a vocabulary nobody has seen (sprout's, say) is
recognised as surely as a famous one. Patterns are those of the models' own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
)
_CASED_END = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_END}"
_SYMBOLS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
# name → (patterns applied one after the other, whole words looked up before merging)
KNOWN: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "llama-bpe": ((_LLAMA3,), True),
    "smaug-bpe": ((_LLAMA3,), False),
    "qwen2": ((rf"{_SHORT}|{_WORD}|\p{{N}}|{_END}",), False),
    "qwen35": (
        (
            rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
    ),
    "smollm": ((r"\p{N}", _GPT2), False),
    "tekken": ((_CASED.replace("{0}", "") + rf"|\p{{N}}|{_CASED_END}",), True),
    "gpt-4o": (
        (_CASED.replace("{0}", f"{_SHORT}?") + rf"|\p{{N}}{{1,3}}|{_CASED_END}",),
        False,
    ),
    "deepseek-v3": (
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            _SYMBOLS + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
    ),
    "seed-coder": (
        (
            rf"{_SHORT}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
    ),
}
PROBES = (
    "Hello, world! don't WE'LL it's I'M you'Ve 'tis",
    "  a  b   c    d\t\te \t f",
    "x\n\ny\n \n  z\r\n\r\nw \n",
    "1 22 333 4444 55555 3.14159 1,000,000 a1b22c333 ²³½ ٣٤٥",
    "if(x!=y){return[x];}//end/**/ /a/b/c\n/d ...!!!??? ---- $€¥ a_b-c",
    "吾輩は猫である。名前はまだ無い。ｱｲｳ カタカナ　全角 東京2024年3月10日、100円",
    "한국어 문장입니다 中文句子，测试。 Привет, мир! مرحبا بالعالم שלום नमस्ते दुनिया ไทย",
    "CamelCase snakeCase HTTPServer iPhone ÀÉÎ àéî ǅ ʰ ªº",
    "naïve café e\u0301 o\u0308 — “quotes” … ‘x’ ﬁ ① Å",
    "🙂👍🏽👩‍👩‍👧‍👦🇯🇵 a🙂b 🚀 (normal) 😶‍🌫️",
    "\u00a0x\u3000y\u2028z\u200bq\ufeff",
    " leading and trailing   ",
    "end.\nnext;\n\n{\n}\n## x /\n",
    "https://example.com/?q=a&b=%20#x user@example.com C:\\dir\\f.txt",
)


def splits_of(pre: PreTokenizer, text: str) -> list[tuple[int, int]]:
    """Where the pieces begin and end in the text."""
    return [span for _, span in pre.pre_tokenize_str(text)]


@cache
def known_splits(name: str) -> tuple[tuple[tuple[int, int], ...], ...]:
    """How llama.cpp's pre-tokenizer of that name splits the probes."""
    parts = [Split(Regex(pattern), "isolated") for pattern in KNOWN[name][0]]
    pre = Sequence([*parts, ByteLevel(add_prefix_space=False, use_regex=False)])
    return tuple(tuple(splits_of(pre, text)) for text in PROBES)


def pre_tokenizer_of(backend: Tokenizer, ignore_merges: bool) -> str | None:
    """The name under which llama.cpp splits text as this tokenizer does; None where it cannot.

    Args:
        ignore_merges: whether a word that is in the vocabulary whole is taken as it is.
    """
    if backend.pre_tokenizer is None:
        return None
    ours = tuple(tuple(splits_of(backend.pre_tokenizer, text)) for text in PROBES)
    same = [name for name in KNOWN if known_splits(name) == ours]
    exact = [name for name in same if KNOWN[name][1] == ignore_merges]
    return next(iter(exact or same), None)
