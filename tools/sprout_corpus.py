"""Dialogue that sprout grows on, from grammars of our own, drawn fresh for every sample.

Its words never existed, so that copying, picking and reordering must be learnt instead of words.
The demo's task (booking rooms) is not in it. Knows no model and no tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from sprout_words import Words

Turns = list[tuple[str, str]]  # (role, text)

SEPARATORS = [
    ", ",
    " / ",
    "; ",
    " - ",
    " > ",
    ": ",
    "\t",
    " + ",
    " = ",
    "、",
    "・",
    "→",
    "\n",
    " ~ ",
]
FIELDS_EN = (
    "name place thing colour number city owner tool animal food title code shape sound".split()
)
FIELDS_JA = "名前 場所 物 色 数 町 持ち主 道具 動物 食べ物 題名 番号 形 音".split()
STORY_EN = {
    "name": ["{} came early", "there was someone called {}", "everyone knew {}", "{} smiled"],
    "place": ["it happened in {}", "near {} the road ends", "they walked to {}", "at {} it rained"],
    "thing": ["the {} was heavy", "someone carried a {}", "on the table lay a {}"],
    "colour": ["the door was {}", "painted in {}", "the sky turned {}"],
    "number": ["{} of them were left", "about {} steps away", "it cost {}"],
    "city": ["the train goes to {}", "a letter from {}", "born in {}"],
    "owner": ["it belongs to {}", "the house of {}", "{} owns it"],
    "tool": ["with a {} it is easy", "bring the {}", "the {} broke"],
    "animal": ["a {} slept there", "the {} ran away", "we saw a {}"],
    "food": ["they ate {}", "there was {} for supper", "{} tastes good"],
    "title": ["the book is called {}", "a song named {}", "reading {} again"],
    "code": ["the code is {}", "written as {}", "marked {}"],
    "shape": ["in the shape of a {}", "cut like a {}", "a {} of glass"],
    "sound": ["it went {}", "a loud {} was heard", "the {} of the bell"],
}
STORY_JA = {
    "名前": ["{}さんが来た", "{}という人がいた", "みんな{}を知っていた", "{}は笑った"],
    "場所": ["{}での出来事だ", "{}の近くで道が終わる", "{}まで歩いた", "{}では雨だった"],
    "物": ["{}は重かった", "誰かが{}を運んだ", "机の上に{}があった"],
    "色": ["扉は{}だった", "{}に塗られた", "空が{}になった"],
    "数": ["{}だけ残った", "{}歩ほど先だ", "{}円だった"],
    "町": ["電車は{}へ行く", "{}から手紙が来た", "{}で生まれた"],
    "持ち主": ["それは{}のものだ", "{}の家", "{}が持っている"],
    "道具": ["{}があれば簡単だ", "{}を持って来て", "{}が壊れた"],
    "動物": ["{}が眠っていた", "{}が逃げた", "{}を見た"],
    "食べ物": ["{}を食べた", "夕飯は{}だった", "{}はおいしい"],
    "題名": ["本の題は{}だ", "{}という歌", "また{}を読んでいる"],
    "番号": ["番号は{}です", "{}と書いてある", "{}の印がある"],
    "形": ["{}の形をした", "{}のように切った", "ガラスの{}"],
    "音": ["{}と鳴った", "{}が聞こえた", "鐘の{}"],
}


def echo(w: Words, ja: bool) -> Turns:
    text = w.phrase(ja, 6)
    asks = (
        [f"「{text}」をそのまま書いて。", f"くり返して：{text}", f"次を写してください。\n{text}"]
        if ja
        else [f'Write "{text}" again.', f"Repeat: {text}", f"Copy this.\n{text}", f"Say {text}"]
    )
    return [("user", w.rng.choice(asks)), ("assistant", text)]


def pick(w: Words, ja: bool) -> Turns:
    items = w.different(ja, w.rng.randint(2, 7))
    place = w.rng.randrange(len(items))
    kind = w.rng.randrange(4)
    line = ("、" if ja else ", ").join(items)
    if kind == 0:
        ask = f"{line}\n{place + 1}番目は？" if ja else f"{line}\nWhich is number {place + 1}?"
        return [("user", ask), ("assistant", items[place])]
    if kind == 1:
        ask = f"逆の順に：{line}" if ja else f"In reverse order: {line}"
        return [("user", ask), ("assistant", ("、" if ja else ", ").join(items[::-1]))]
    if kind == 2:
        ask = f"{line} から{items[place]}を除いて" if ja else f"{line}, without {items[place]}"
        rest = [x for i, x in enumerate(items) if i != place]
        return [("user", ask), ("assistant", ("、" if ja else ", ").join(rest))]
    mark = w.rng.choice(["* ", "- ", "1) ", "・", "# "])
    ask = (
        f"箇条書きにして（{mark.strip()}）：{line}"
        if ja
        else f"As a list with {mark.strip()}: {line}"
    )
    return [("user", ask), ("assistant", "\n".join(mark + x for x in items))]


def lookup(w: Words, ja: bool) -> Turns:
    count = w.rng.randint(2, 6)
    keys, values = w.different(ja, count), [w.phrase(ja, 3) for _ in range(count)]
    sep = w.rng.choice([": ", " = ", " -> ", "は", " is "])
    table = "\n".join(k + sep + v for k, v in zip(keys, values, strict=True))
    i = w.rng.randrange(count)
    ask = w.rng.choice(
        [f"{keys[i]}は？", f"{keys[i]}を教えて"] if ja else [f"What is {keys[i]}?", f"{keys[i]}?"]
    )
    turns: Turns = [("user", f"{table}\n{ask}"), ("assistant", values[i])]
    if w.rng.random() < 0.4:
        j = w.rng.randrange(count)
        turns += [("user", f"{keys[j]}は？" if ja else f"And {keys[j]}?"), ("assistant", values[j])]
    return turns


def extract(w: Words, ja: bool) -> Turns:
    """A few sentences with named slots; the question asks for some of them in some form."""
    rng = w.rng
    stories, names = (STORY_JA, FIELDS_JA) if ja else (STORY_EN, FIELDS_EN)
    fields = rng.sample(names, rng.randint(2, 5))
    values = {
        f: w.word(ja) if f not in ("number", "数") else str(rng.randint(1, 999)) for f in fields
    }
    told = [rng.choice(stories[f]).format(values[f]) for f in fields]
    rng.shuffle(told)
    joined = (
        (rng.choice(["。", "、"]).join(told) + "。")
        if ja
        else ". ".join(
            t[0].upper() + t[1:] if not t.startswith(tuple(values.values())) else t for t in told
        )
        + "."
    )
    if not ja and rng.random() < 0.5:
        joined = rng.choice([", and ", ", while ", " but "]).join(told) + "."
    wanted = rng.sample(fields, rng.randint(1, len(fields)))
    return (
        [
            ("user", *_question(rng, ja, joined, wanted)),
            ("assistant", _form(rng, ja, wanted, values)),
        ]
        if len(wanted) == 1
        else _formatted(w, ja, joined, wanted, values)
    )


def _question(rng: random.Random, ja: bool, story: str, wanted: list[str]) -> tuple[str]:
    ask = f"{wanted[0]}は何ですか。" if ja else f"What is the {wanted[0]}?"
    return (f"{story}\n{ask}" if rng.random() < 0.6 else f"{ask}\n{story}",)


def _form(_: random.Random, __: bool, wanted: list[str], values: dict[str, str]) -> str:
    return values[wanted[0]]


def _formatted(w: Words, ja: bool, story: str, wanted: list[str], values: dict[str, str]) -> Turns:
    rng, kind = w.rng, w.rng.randrange(5)
    listed = ("と" if ja else ", ").join(wanted)
    if kind == 0:
        sep = rng.choice(SEPARATORS)
        form = sep.join(f"<{f}>" for f in wanted)
        ask = f"次の形で：{form}" if ja else f"In this form: {form}"
        answer = sep.join(values[f] for f in wanted)
    elif kind == 1:
        ask = f"{listed}をJSONで" if ja else f"{listed} as JSON"
        answer = "{" + ", ".join(f'"{f}": "{values[f]}"' for f in wanted) + "}"
    elif kind == 2:
        verb = w.english().lower()
        ask = f"{verb}({', '.join(wanted)})"
        answer = f"{verb}({', '.join(values[f] for f in wanted)})"
    elif kind == 3:
        ask = f"{listed}を一行ずつ" if ja else f"{listed}, one a line"
        answer = "\n".join(f"{f}: {values[f]}" for f in wanted)
    else:
        flag = rng.choice(["--", "-", "/"])
        tool = w.english().lower()
        ask = f"{tool} {' '.join(flag + f for f in wanted)}"
        answer = tool + "".join(f" {flag}{f} {values[f]}" for f in wanted)
    return [
        ("user", f"{story}\n{ask}" if rng.random() < 0.6 else f"{ask}\n{story}"),
        ("assistant", answer),
    ]


RUNNING_EN = [
    "{} took {} to {} for {}", "{} and {} went to {} with {}", "for {}, {} made {} near {}",
    "{} told {} about {} in {}", "in {} {} met {} because of {}", "{} sold {} to {} at {}",
    "{} likes {} more than {} or {}", "from {} to {}, {} carries {}", "{}'s {} is older than {} of {}",
    "please send {} to {} before {} leaves {}", "could {} bring {} to {} with {}?",
    "{} asks: where is {} of {} in {}?", "does {} know {} and {} from {}?",
]  # fmt: skip
RUNNING_JA = [
    "{}は{}に{}さんと{}を送る", "{}の{}を{}へ持って{}まで行く", "{}さんの{}、{}の{}を見た",
    "{}から{}まで{}で行きます。{}です", "{}が{}より{}に似ていると{}は言った", "{}です。{}の{}と{}を買った",
    "{}と{}は{}で{}に会った", "{}さんに{}の{}が{}だと伝えて", "{}を{}の{}に{}さんが渡しました",
    "{}の{}が{}にあるか、{}さんに聞いて", "{}さんは{}を{}で{}と呼ぶ", "{}へ{}を{}さんが届け、{}は笑った",
]  # fmt: skip


GLUE_EN = (
    """
and|with|for|to|from|in|at|near|before|after|told|asked|met|has|had|wants|needs|gave|is|was|of|or|but
about|under|without|because of|next to|instead of|went to|came from|would like|looks like|is called
will see|can use|takes|brings|, then|; also|: that is|, says|'s|, who knew|on the way to|, please,
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
GLUE_JA = (
    """
は|を|に|の|と|で|が|も|へ|から|まで|より|や|、|さんの|さんに|さんが|さんは|さんと|さんを|という|について
ですが、|です。|だと|として|のための|の近くで|の前に|の後に|を持って|に会って|へ行き、|で見た|と呼ばれる
の代わりに|を借りた|が好きな|による|のある|ではなく|だけ|など|さんも|様の|君が|ちゃんと|の中の|に似た
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
START_EN = [
    "",
    "",
    "",
    "The ",
    "Please tell ",
    "Did ",
    "Yesterday ",
    "For ",
    "If ",
    "I saw ",
    "With ",
]
START_JA = ["", "", "", "", "昨日、", "もし", "私は", "あの", "今日の", "では、", "次は"]
END_EN = [".", ".", "?", "!", " again.", ", I think.", " today.", ", please.", ", is it not?"]
END_JA = [
    "。",
    "。",
    "です。",
    "ですか。",
    "だった。",
    "ください。",
    "を見た。",
    "になる。",
    "でした。",
    "へ。",
    "だよ。",
]


def sentence(w: Words, ja: bool, words: list[str]) -> str:
    """The words in order, with particles or function words between them."""
    rng = w.rng
    if len(words) == 4 and rng.random() < 0.35:
        text = rng.choice(RUNNING_JA if ja else RUNNING_EN).format(*words)
        return text if text.endswith("?") else text + ("。" if ja else ".")
    text = rng.choice(START_JA if ja else START_EN) + words[0]
    for word in words[1:]:
        glue = rng.choice(GLUE_JA if ja else GLUE_EN)
        text += glue + word if ja else f"{'' if glue[0] in ',;:' + chr(39) else ' '}{glue} {word}"
    return text + rng.choice(END_JA if ja else END_EN)


def running(w: Words, ja: bool) -> Turns:
    """Words inside one running sentence, picked out in order; neighbours are only particles."""
    rng = w.rng
    size = rng.choice((2, 3, 4, 4, 5))
    words = [w.japanese() if ja else w.english() for _ in range(size)]
    if rng.random() < 0.25:
        words[rng.randrange(size)] = str(rng.randint(1, 999))
    text = sentence(w, ja, words)
    text = text[0].upper() + text[1:] if not ja and rng.random() < 0.5 else text
    count = rng.randint(1, size)
    places = (
        sorted(rng.sample(range(size), count))
        if rng.random() < 0.6
        else rng.sample(range(size), count)
    )
    sep = rng.choice(SEPARATORS)
    form = sep.join(str(i + 1) for i in places)
    ask = f"言葉を次の順に：{form}" if ja else f"The words as {form}"
    answer = sep.join(words[i] for i in places)
    return [
        ("user", f"{text}\n{ask}" if rng.random() < 0.5 else f"{ask}\n{text}"),
        ("assistant", answer),
    ]


def pattern(w: Words, ja: bool) -> Turns:
    """Examples in the prompt show a form; the last line is to be done alike."""
    rng = w.rng
    size = rng.randint(2, 4)
    order = rng.sample(range(size), rng.randint(1, size))
    left, right = rng.choice(SEPARATORS[:8]), rng.choice(SEPARATORS)
    arrow = rng.choice([" => ", " -> ", "\n= ", "：", " becomes "])
    head, tail = rng.choice([("", ""), ("[", "]"), ("", "!"), (w.english() + " ", "")])
    lines = []
    for _ in range(rng.randint(2, 4)):
        words = w.different(ja, size)
        lines.append(left.join(words) + arrow + head + right.join(words[i] for i in order) + tail)
    words = w.different(ja, size)
    prompt = "\n".join([*lines, left.join(words) + arrow.rstrip()])
    return [("user", prompt), ("assistant", head + right.join(words[i] for i in order) + tail)]


def swap(w: Words, ja: bool) -> Turns:
    words = [w.word(ja) for _ in range(w.rng.randint(3, 8))]
    i, new = w.rng.randrange(len(words)), w.word(ja)
    text = (" " if not ja else w.rng.choice(["", " ", "、"])).join(words)
    ask = f"「{text}」の{words[i]}を{new}に変えて" if ja else f"Change {words[i]} to {new}: {text}"
    return [("user", ask), ("assistant", text.replace(words[i], new))]


def arithmetic(w: Words, ja: bool) -> Turns:
    a, b = w.rng.randint(0, 20), w.rng.randint(0, 20)
    sign, result = w.rng.choice([("+", a + b), ("-", a - b)])
    thing = w.word(ja)
    if w.rng.random() < 0.4:
        ask = (
            f"{thing}が{a}個、さらに{b}個。全部で？"
            if ja
            else f"{a} {thing} and {b} more. How many?"
        )
        return [("user", ask), ("assistant", f"{a + b}{'個' if ja else ''}")]
    return [("user", f"{a} {sign} {b} {'は？' if ja else '= ?'}"), ("assistant", str(result))]


def talk(w: Words, ja: bool) -> Turns:
    """Small talk that remembers a name and a thing."""
    rng, name, thing = w.rng, w.word(ja), w.word(ja)
    if ja:
        turns: Turns = [
            (
                "user",
                rng.choice(
                    [f"こんにちは、{name}です。", f"私は{name}といいます。", f"{name}と呼んで。"]
                ),
            ),
            ("assistant", rng.choice([f"こんにちは、{name}さん。", f"{name}さん、はじめまして。"])),
        ]
        more = [
            (f"{thing}が好きです。", f"{thing}はいいですね。"),
            (f"今日は{thing}を買いました。", f"{thing}を買ったのですね。"),
            ("私の名前は？", f"{name}さんです。"),
            ("ありがとう。", "どういたしまして。"),
            ("元気ですか。", "はい、元気です。"),
            ("あなたは誰？", "私はスプラウト、練習用の小さなモデルです。"),
        ]
    else:
        turns = [
            (
                "user",
                rng.choice([f"Hello, I am {name}.", f"My name is {name}.", f"Call me {name}."]),
            ),
            ("assistant", rng.choice([f"Hello, {name}.", f"Nice to meet you, {name}."])),
        ]
        more = [
            (f"I like {thing}.", f"{thing} is nice."),
            (f"I bought {thing} today.", f"So you bought {thing}."),
            ("What is my name?", f"Your name is {name}."),
            ("Thank you.", "You are welcome."),
            ("How are you?", "I am well, thank you."),
            ("Who are you?", "I am Sprout, a small practice model."),
        ]
    for ask, answer in rng.sample(more, rng.randint(0, 3)):
        turns += [("user", ask), ("assistant", answer)]
    return turns


KINDS: list[tuple[Callable[[Words, bool], Turns], int]] = [
    (echo, 10), (pick, 10), (lookup, 12), (extract, 26), (running, 32), (pattern, 12), (swap, 8),
    (arithmetic, 4), (talk, 10),
]  # fmt: skip


def dialogue(rng: random.Random, known: list[str]) -> Turns:
    """One conversation, English or Japanese, now and then two tasks in a row."""
    words = Words(rng, known)
    japanese = rng.random() < 0.5
    makers, weights = zip(*KINDS, strict=True)
    turns: Turns = []
    if rng.random() < 0.08:
        turns.append(("system", "短く答えて。" if japanese else "Answer briefly."))
    for _ in range(2 if rng.random() < 0.15 else 1):
        turns += rng.choices(makers, weights)[0](words, japanese)
    return turns


def render(turns: Turns) -> str:
    """As sprout's chat template writes it."""
    return "".join(f"<|{role}|>\n{text}<|end|>\n" for role, text in turns)
