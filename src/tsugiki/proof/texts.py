"""Steps 3 and 4: token ids on nasty strings, and the chat template on conversations.

A tokenizer that lost an added token, or a template that renders another text, gives a model that
looks whole and answers badly. Knows no tensors.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from tsugiki.data.chat import ChatFormat
from tsugiki.data.row import Message, RowProblem
from tsugiki.errors import TsugikiError
from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import Check, found

STRINGS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t\tx",
    "a ",
    " a",
    "  a  b   c  ",
    "a\r\nb\rc",
    "\u00a0x\u3000y",
    "Hello, world!",
    "HELLO hello HeLLo",
    "don't won't it's I'LL",
    "1234567890 3.14159 1,000,000",
    "x=1;y+=2;if(x!=y){return[x];}",
    "def f(a):\n    return a**2\n",
    "https://example.com/?q=a&b=%20",
    "吾輩は猫である。名前はまだ無い。",
    "カタカナ　ひらがな　漢字",
    "ｱｲｳｴｵ ﾊﾝｶｸ",
    "「それは、何ですか？」と聞いた。",
    "東京2024年3月",
    "한국어 문장입니다",
    "中文句子，测试。",
    "Привет, мир",
    "مرحبا بالعالم",
    "שלום",
    "e\u0301 é ﬁ ① Å",
    "🙂👍🏽👩‍👩‍👧‍👦🇯🇵",
    "a🙂b 猫🐱",
    "\u200bzero\u200dwidth\ufeff",
    "tab\tand\x0bvertical",
    "<s></s><unk><pad>",
    "<|im_start|>user\nhi<|im_end|>",
    "<bos><eos><start_of_turn>",
    "<|endoftext|>",
    "[INST] x [/INST]",
    "<0x0A> ▁ Ġ Ċ",
    "#" * 40,
    " " * 33,
    "ab" * 100,
    "naïve café — “quotes” … ‘x’",
    "\\n \\t \\u0041",
    "{{ x }} {% if %}",
    "\x00\x01\x7f",
)
# For the perplexities of models that read English, documentation or Japanese.
PASSAGES = (
    "Once upon a time there was a little girl who lived in a small house near the forest. Every "
    "morning she went outside to play with her dog. One day they found a red ball under a big "
    "tree. She was very happy and wanted to show it to her mother. Her mother smiled and said that "
    "they could play with it together. They played until the sun went down, and then they went "
    "home to eat dinner. The dog was tired and fell asleep by the fire. The next day it rained, so "
    "they stayed inside and read a book about a brave cat who sailed across the sea to find a new "
    "friend.",
    "The function takes a list of strings and returns a new list in which every string is written "
    "in lower case. If the argument is not a list, a TypeError is raised. The default value of the "
    "second argument is None, which means that the order of the items is not changed. To sort the "
    "result, pass True. The following example shows how to read a file line by line and count the "
    "words in it. Note that the file must be opened in text mode, and that it is closed when the "
    "block ends. See the documentation of the module for more information about the options that "
    "can be set in the configuration file.",
    "昔々、山のふもとの小さな村に、おじいさんとおばあさんが住んでいました。おじいさんは毎朝、"
    "畑へ出かけて野菜を育てていました。おばあさんは川で洗濯をしながら、鳥の声を聞くのが好きでした。"
    "ある日、川の上流から大きな桃が流れてきました。二人は桃を家に持ち帰り、"
    "切って食べることにしました。すると中から元気な子供が出てきたので、二人はとても驚きました。",
)
TALKS: tuple[tuple[Message, ...], ...] = (
    (Message("user", "Hello"),),
    (Message("user", "日本の首都はどこですか？"),),
    (Message("system", "You are terse."), Message("user", "What is 2+2?")),
    (Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "  Bye \n")),
    (
        Message("system", "あなたは猫です。"),
        Message("user", "名前は？"),
        Message("assistant", "まだ無い🐱"),
        Message("user", "どこで\n生れた？"),
    ),
    (Message("user", "🙂 <|im_end|> </s> {{ x }}"),),
    (Message("user", " "), Message("assistant", "?"), Message("user", "def f():\n    pass")),
)


def compare_tokens(reference: Artefact, candidate: Artefact) -> list[Check]:
    """The same ids for every string, with and without special tokens, and the same text back."""
    ours, theirs = reference.chat().tokenizer, candidate.chat().tokenizer
    strings = [*STRINGS, *added_tokens(ours), *added_tokens(theirs)]
    strings += [f"a {token} b{token}c" for token in added_tokens(ours)]
    wrong = []
    for text in dict.fromkeys(strings):
        for special in (True, False):
            a, b = ids_of(ours, text, special), ids_of(theirs, text, special)
            if a != b:
                wrong.append(f"{text[:40]!r}: {b[:12]}, the reference gives {a[:12]}")
                break
        else:
            if ours.decode(ids_of(ours, text, False)) != theirs.decode(ids_of(theirs, text, False)):
                wrong.append(f"{text[:40]!r}: the ids read back as another text")
    missing = [
        f"added token {token!r}: missing"
        for token in added_tokens(ours)
        if token not in theirs.get_vocab()
    ]
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    missing += [
        f"{name}: {getattr(theirs, name)}, the reference has {getattr(ours, name)}"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]
    rows = candidate.embedding_rows()
    if rows is not None and len(theirs) > rows and len(theirs) != len(ours):
        missing.append(f"the tokenizer has {len(theirs)} tokens, the embedding {rows} rows")
    if len(ours) != len(theirs):
        missing.append(f"{len(theirs)} tokens, the reference has {len(ours)}")
    return [
        found("3 token ids", "nasty strings", wrong, len(dict.fromkeys(strings)), "strings"),
        found("3 token ids", "vocabulary", missing, len(added_tokens(ours)) + 6, "facts"),
    ]


def compare_templates(reference: Artefact, candidate: Artefact) -> list[Check]:
    """The same prompt ids for the same conversations, and the same stop token."""
    ours, theirs = reference.chat(), candidate.chat()
    day = ours.date or theirs.date  # an adapter's is that of its training, a model's is today
    ours, theirs = (ChatFormat(c.tokenizer, c.name, day) for c in (ours, theirs))
    wrong = []
    for talk in TALKS:
        a, b = prompt_of(ours, talk), prompt_of(theirs, talk)
        if a != b:
            wrong.append(f"{talk[-1].content[:20]!r} ({len(talk)} turns): {first_difference(a, b)}")
    stop = []
    if ours.stop_id != theirs.stop_id:
        stop.append(f"answers end with {theirs.stop_id}, the reference's with {ours.stop_id}")
    return [
        found("4 template", "prompts of conversations", wrong, len(TALKS), "prompts"),
        found("4 template", "stop token", stop, 1, "tokens"),
    ]


def prompts(artefact: Artefact) -> list[list[int]]:
    """Real prompts for the logits."""
    chat = artefact.chat()
    made = [prompt_of(chat, talk) for talk in TALKS]
    return [list(ids) for ids in made if not isinstance(ids, str) and ids]


def token_ids(artefact: Artefact, text: str) -> list[int]:
    """Of a text, as the model reads one."""
    return ids_of(artefact.chat().tokenizer, text, True)


def prompt_of(chat: ChatFormat, talk: tuple[Message, ...]) -> list[int] | str:
    """Ids, or why the template refuses the conversation."""
    try:
        return chat.prompt_ids(talk)
    except (RowProblem, TsugikiError) as error:
        return f"refused: {str(error)[:80]}"


def first_difference(a: list[int] | str, b: list[int] | str) -> str:
    if isinstance(a, str) or isinstance(b, str):
        return f"{b if isinstance(b, str) else 'rendered'}; the reference: " + (
            a if isinstance(a, str) else "rendered"
        )
    at = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return f"other ids from position {at}: {b[at : at + 6]}, the reference gives {a[at : at + 6]}"


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    found: Any = tokenizer(text, add_special_tokens=special)["input_ids"]
    return list(found)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(token) for token in tokenizer.get_added_vocab()]
