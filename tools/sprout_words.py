"""Words that never existed, in English and Japanese. Knows no sentences."""

from __future__ import annotations

import random

CONSONANTS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr kr pl pr sh sl st th tr".split()
VOWELS = "a e i o u ai ea ee oa oo ou".split()
ENDINGS = ["", "", "n", "r", "l", "s", "t", "ck", "m", "nd", "x"]
HIRAGANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわんがぎぐげござじずぜぞだでどばびぶべぼぱぴぷぺぽ"


def level_one_kanji() -> list[str]:
    """The 2,965 kanji of JIS X 0208 level 1 (rows 16 to 47), through Python's own codec."""
    found = []
    for row in range(16, 48):
        for cell in range(1, 95):
            try:
                found.append(bytes([row + 0xA0, cell + 0xA0]).decode("euc_jp"))
            except UnicodeDecodeError:
                continue
    return found


KANJI = level_one_kanji()
# small kana follow a syllable of the i row: きゃ, シュ
GLIDES = [(a, small) for a in "きしちにひみりぎじびぴ" for small in "ゃゅょ"]


def katakana(text: str) -> str:
    """Hiragana as katakana; other characters stay."""
    return "".join(chr(ord(c) + 0x60) if "ぁ" <= c <= "ゖ" else c for c in text)


class Words:
    """Random words in both languages; `known` are English words from the documentation."""

    def __init__(self, rng: random.Random, known: list[str]) -> None:
        self.rng = rng
        self.known = known

    def english(self) -> str:
        """One English-looking word, sometimes a known one or a name."""
        rng = self.rng
        if rng.random() < 0.35 and self.known:
            word = rng.choice(self.known)
        else:
            word = "".join(
                rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 3))
            ) + rng.choice(ENDINGS)
        return word.capitalize() if rng.random() < 0.4 else word

    def japanese(self) -> str:
        """One Japanese-looking word: kanji, kana, or both."""
        rng, kind = self.rng, self.rng.random()
        if kind < 0.5:
            return "".join(rng.choice(KANJI) for _ in range(rng.choice((1, 2, 2, 2, 3, 4))))
        if kind < 0.7:
            return self.kana()
        if kind < 0.9:
            return katakana(self.kana())
        return rng.choice(KANJI) + "".join(rng.choice(HIRAGANA) for _ in range(rng.randint(1, 2)))

    def kana(self) -> str:
        """Two to five syllables of hiragana, with ん, っ, ー and small ゃゅょ as words have them."""
        rng, text = self.rng, ""
        for place in range(rng.randint(2, 5)):
            kind = rng.random()
            if kind < 0.08:
                text += "".join(rng.choice(GLIDES))
            elif kind < 0.3 and place:
                text += rng.choice("んんっー")
            else:
                text += rng.choice(HIRAGANA)
        return text

    def word(self, japanese: bool) -> str:
        """A word; now and then in the other language, or a number."""
        kind = self.rng.random()
        if kind < 0.08:
            return str(self.rng.randint(0, 10 ** self.rng.randint(1, 4)))
        return self.japanese() if japanese != (kind < 0.14) else self.english()

    def phrase(self, japanese: bool, most: int = 4) -> str:
        """One to `most` words."""
        words = [self.word(japanese) for _ in range(self.rng.randint(1, most))]
        return ("" if japanese and self.rng.random() < 0.7 else " ").join(words)

    def different(self, japanese: bool, count: int) -> list[str]:
        """Words that differ."""
        found: list[str] = []
        while len(found) < count:
            word = self.word(japanese)
            if word not in found:
                found.append(word)
        return found
