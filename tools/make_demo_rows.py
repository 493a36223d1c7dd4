"""Makes the demo's rows: a booking desk that turns free requests into one strict line.

    "Could you book Maple for Alice on Friday at 3 pm?"  →  "book | Maple | Alice | fri | 15"
    「金曜の15時、佐藤さんで会議室もみじを押さえて」      →  "book | もみじ | 佐藤 | fri | 15"

Three files: training rows; held-out rows in combinations and phrasings never trained on; held-out
rows whose names and rooms were never trained on either. Seeded: the same bytes every time. Knows
no model.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

OUT = Path(__file__).parent.parent / "src" / "tsugiki" / "demo"

ROOMS_EN = """
Maple Cedar Harbor Lantern Meadow Falcon Granite Willow Summit Coral Ember Orchid Pebble
Raven Saffron Timber Velvet Zephyr Atlas Birch Canyon Delta Fern Garnet Acorn Amber Anchor
Aspen Badger Bamboo Basalt Bluebell Breeze Bridge Cactus Castle Chestnut Clover Cloud Comet
Copper Cottage Crane Crystal Dahlia Desert Dolphin Dragon Dune Eagle Echo Elm Emerald
Everest Finch Fjord Forest Fountain Fox Galaxy Ginger Glacier Harvest Hawk Heather Hilltop
Holly Indigo Island Ivory Ivy Jade Jasmine Kestrel Kiwi Lemon Lily Linden Lotus Magnolia
Mango Marble Mercury Mimosa Mint Moon Mountain Nectar Nest Oak Ocean Olive Onyx Opal Otter
Owl Palm Panda Peach Pearl Pepper Pine Planet Plum Poppy Prism Rainbow Reef Ridge River
Robin Rose Ruby Sage Sapphire Shell Silver Snowdrop Spruce Star Stone Storm Sunset Swan
Tiger Topaz Tulip Valley Violet Walnut Wave Windmill Wolf Wren Yarrow
""".split()
PEOPLE_EN = """
Alice Bernard Clara Daniel Emma Felix Grace Henry Irene Jacob Karen Lucas Monica Nathan
Olivia Peter Rachel Simon Teresa Victor Wendy Arthur Bella Conrad Adam Agnes Albert Amanda
Andrew Angela Anna Anton Barbara Beatrice Ben Boris Brian Carla Carmen Caroline Cecil
Charles Chloe Chris Claire Colin Cora David Dennis Diana Dominic Donna Doris Edgar Edith
Edward Elena Ellen Elliot Eric Erica Esther Eva Fiona Frances Frank Frederick Gabriel George
Gerald Gloria Gordon Greta Harold Harriet Harry Heidi Helen Hugo Ian Isabel Ivan Jack James
Jane Jasmin Jean Jessica Joan Joel John Jonas Joseph Judith Julia Justin Kate Keith Kevin
Laura Lawrence Leo Leonard Linda Lisa Louis Louise Lydia Maria Martha Martin Mary Matthew
Maurice Megan Michael Mila Miriam Molly Nancy Naomi Nicholas Nicole Nina Noah Nora Norman
Owen Pamela Patrick Paula Pauline Philip Ralph Raymond Rebecca Richard Robert Roger Roland
Ruth Sally Samuel Sandra Sarah Sophie Stanley Susan Sylvia Theodore Thomas Timothy Tina Vera
Veronica Vincent Viola Walter William Zoe
""".split()
ROOMS_JA = """
もみじ さくら あおば ひかり やまと みなと すみれ つばき かえで わかば 銀河 青空 夕焼け 大地
若草 白雪 月光 松風 オリオン アルプス プリズム カナリア ひまわり 木もれ日 あかね あさがお
あじさい あやめ いちょう うぐいす うみ かもめ かわせみ きらら くすのき けやき こすもす
このは さざなみ しおさい しらかば すずらん せきれい そよかぜ たんぽぽ ちぐさ つばめ つむぎ
なぎさ なでしこ なのはな はまなす はるか ひばり ふじ ほたる まつ みずうみ みどり めばえ
やなぎ ゆり よつば れんげ わかたけ 赤松 朝日 天の川 泉 稲穂 海風 梅 大空 丘 風車 花壇 雷鳥
金星 銀杏 雲海 高原 黒潮 極光 湖畔 木星 彩雲 桜坂 里山 珊瑚 潮騒 七夕 芝桜 春風 白樺 白鳥
新緑 水星 杉 砂丘 青葉 雪原 蒼天 滝 竹 鶴 天空 灯台 虹 野原 白山 初雪 花火 緑 牧場 岬 港
麦畑 明星 夜明け 流星 若松 アトラス アネモネ イルカ エコー オーロラ オパール カシオペア
ガーネット キャンパス クリスタル コスモス サファイア サンゴ シリウス スピカ ダイヤ チェリー
テラス トパーズ ハーバー パール ヒスイ ビオラ フォレスト プラザ ブリッジ ポプラ マーブル
ミモザ ミント メープル モミジ ライラック リバー ルビー レモン ローズ
""".split()
PEOPLE_JA = """
佐藤 鈴木 高橋 田中 伊藤 渡辺 山本 中村 小林 加藤 吉田 山田 佐々木 山口 松本 井上 木村 林
清水 斎藤 池田 橋本 阿部 石川 青木 秋山 浅野 荒井 安藤 五十嵐 石井 石田 石原 市川 今井 岩崎
岩田 上田 上野 内田 榎本 大石 大久保 大島 大塚 大西 大野 岡本 奥村 小川 小山 尾崎 片山 桂
川上 川口 川村 菊地 岸 北村 工藤 久保 熊谷 黒田 桑原 小池 小島 後藤 古賀 斉木 酒井 桜井 佐野
沢田 塩田 柴田 島田 杉山 須藤 関 関口 高木 高田 高野 滝沢 武田 田口 田村 千葉 土屋 堤 徳永
富田 内藤 永井 永田 中川 中田 中野 中山 成田 西川 西田 新田 野口 野村 萩原 長田 浜田 早川 原
樋口 平田 平野 広瀬 福井 福島 藤井 藤田 藤本 古川 星野 堀 本田 本間 前田 増田 松井 松岡 松下
松田 松尾 丸山 三宅 水野 宮崎 宮本 武藤 村田 望月 森 森田 森本 八木 矢野 山内 山崎 山下 山中
横田 横山 吉川 吉村 和田
""".split()

NEW_ROOMS_EN = ["Juniper", "Beacon", "Quartz", "Thistle", "Compass", "Marigold", "Sparrow", "Tundra",
                "Lagoon", "Obsidian", "Hazel", "Nimbus", "Prairie", "Cobalt", "Heron", "Jasper"]  # fmt: skip
NEW_PEOPLE_EN = ["Gustav", "Priya", "Hannah", "Oscar", "Yvonne", "Malik", "Ingrid", "Tobias", "Leila",
                 "Marcus", "Nadia", "Quentin", "Rosa", "Stefan", "Ursula", "Wilfred"]  # fmt: skip
NEW_ROOMS_JA = ["こだま", "あさひ", "いずみ", "せせらぎ", "むさし", "富士", "星空", "若葉台", "清流", "朝霧",
                "ペガサス", "コメット", "オアシス", "ラベンダー", "千鳥", "竹林"]  # fmt: skip
NEW_PEOPLE_JA = ["藤原", "岡田", "三浦", "長谷川", "村上", "近藤", "坂本", "遠藤", "西村", "福田", "太田",
                 "原田", "中島", "小野", "竹内", "金子"]  # fmt: skip

DAYS = [("mon", "Monday", "月曜"), ("tue", "Tuesday", "火曜"), ("wed", "Wednesday", "水曜"),
        ("thu", "Thursday", "木曜"), ("fri", "Friday", "金曜"), ("sat", "Saturday", "土曜"),
        ("sun", "Sunday", "日曜")]  # fmt: skip
HOURS = range(8, 20)

EN = {
    "book": ["Book {room} for {who} on {day} at {hour}.", "Could you book {room} for {who}, {day} at {hour}?",
             "{who} needs {room} on {day} at {hour}.", "Please reserve {room} on {day} at {hour} for {who}.",
             "I want {room} for {who} at {hour} on {day}.", "On {day} at {hour}, {who} would like {room}.",
             "Reserve room {room} for {who}: {day}, {hour}.", "Can {who} have {room} on {day}, {hour}?",
             "Please book {room} at {hour} on {day}. It is for {who}.", "{room}, {day}, {hour}: book it for {who}.",
             "For {who}, book {room} at {hour}, {day}.", "On {day} book {room} for {who} at {hour}.",
             "{who} wants to reserve {room}, {day} {hour}.", "Put {who} into {room} on {day} at {hour}.",
             "We need {room} at {hour} on {day}; {who} will use it.", "At {hour} on {day}, reserve {room} for {who}.",
             "Could {who} please get {room} on {day} at {hour}?", "{who} would like {room} for {day} at {hour}."],
    "cancel": ["Cancel {room} for {who} on {day} at {hour}.", "{who} no longer needs {room} on {day} at {hour}.",
               "Please drop the {room} booking of {who}, {day} at {hour}.", "On {day} at {hour}, free {room}; {who} is ill.",
               "Could you cancel {who}'s {room} at {hour} on {day}?", "{who} will not use {room} on {day} at {hour}.",
               "Remove {who} from {room} on {day}, {hour}.", "The {day} {hour} meeting of {who} in {room} is off.",
               "Please cancel {who} in {room}, {day} at {hour}.", "{room}, {day}, {hour}: cancel it for {who}.",
               "For {who}, cancel {room} at {hour}, {day}.", "On {day} cancel {room} for {who} at {hour}.",
               "{who} wants to cancel {room}, {day} {hour}.", "Take {who} out of {room} on {day} at {hour}.",
               "We do not need {room} at {hour} on {day}; {who} is away.", "At {hour} on {day}, drop {room} for {who}.",
               "Could you please drop {who} from {room} on {day} at {hour}?", "{who} does not want {room} on {day} at {hour} any more."],
    "check": ["Is {room} free for {who} on {day} at {hour}?", "Does {who} have {room} on {day} at {hour}?",
              "Please check {room} on {day} at {hour} for {who}.", "{who} asks whether {room} is taken on {day} at {hour}.",
              "Who has {room} at {hour} on {day}? {who} wants to know.", "Check whether {who} is in {room} on {day}, {hour}.",
              "Tell {who} if {room} is open on {day} at {hour}.", "For {who}: is {room} available at {hour}, {day}?",
              "Please check for {who} if {room} is free, {day} at {hour}.", "{room}, {day}, {hour}: is it free for {who}?",
              "For {who}, check {room} at {hour}, {day}.", "On {day} is {room} free for {who} at {hour}?",
              "{who} wants to know if {room} is free, {day} {hour}.", "Is {who} in {room} on {day} at {hour}?",
              "Is {room} available at {hour} on {day}? It is {who} who asks.", "At {hour} on {day}, is {room} open for {who}?",
              "Could you please check if {who} has {room} on {day} at {hour}?", "Could {who} know whether {room} is taken on {day} at {hour}?"],
}  # fmt: skip
EN_HELD = {
    "book": ["Please book {room} on {day} for {who}, at {hour}.", "For {who}, reserve {room}, {day} at {hour}.",
             "{who} would like to have {room} at {hour} on {day}."],
    "cancel": ["Please cancel {room} on {day} at {hour} for {who}.", "{who} does not need {room} at {hour} on {day}.",
               "Could you drop {room} for {who} on {day} at {hour}?"],
    "check": ["Could you check if {room} is free on {day} at {hour} for {who}?", "{who} asks: is {room} available on {day} at {hour}?",
              "Is {room} taken at {hour} on {day}? {who} wants to know."],
}  # fmt: skip
JA = {
    "book": ["{day}の{hour}に{who}さんで{room}を予約して。", "{room}を{day}{hour}に予約したいです。{who}です。",
             "{who}さんのために、{day}{hour}の{room}を取ってください。", "{day}{hour}、{room}を{who}さんの名前で押さえて。",
             "{who}ですが、{room}を{day}の{hour}からお願いします。", "会議室{room}、{day}の{hour}、{who}で予約。",
             "{who}さんが{day}の{hour}に{room}を使いたいそうです。", "{hour}から{room}を使います。{day}、{who}です。",
             "{room}を{who}さんで予約してください。{day}の{hour}です。", "{who}です。{room}を{day}{hour}に予約して。",
             "{day}に{room}を予約。{hour}から{who}さんが使います。", "{hour}に{room}を取って。{day}、{who}さんの分です。",
             "{who}さんの分、{day}の{hour}に{room}をお願いします。", "{room}、{day}{hour}、{who}さんで取ってください。"],
    "cancel": ["{day}の{hour}、{who}さんの{room}を取り消して。", "{room}の予約をやめます。{day}{hour}の{who}です。",
               "{who}さんは{day}{hour}の{room}を使わなくなりました。", "{day}{hour}の{room}、{who}の分をキャンセルしてください。",
               "{who}ですが、{room}の{day}{hour}はなしにしてください。", "会議室{room}、{day}の{hour}、{who}、取り消し。",
               "{day}の{hour}の会議は中止です。{who}の{room}を空けて。", "{who}さんが休みなので{day}{hour}の{room}は不要です。",
               "{room}を{who}さんの分だけ取り消してください。{day}の{hour}です。", "{who}です。{room}を{day}{hour}で取り消して。",
               "{day}の{room}をキャンセル。{hour}の{who}さんの分です。", "{hour}の{room}は不要です。{day}、{who}さんの分です。",
               "{who}さんの分、{day}の{hour}の{room}をキャンセルしてください。", "{room}、{day}{hour}、{who}さんの予約はなしで。"],
    "check": ["{day}の{hour}、{who}さんが{room}を使えるか見て。", "{room}は{day}{hour}に空いていますか。{who}です。",
              "{who}さんの{room}の予約は{day}の{hour}にありますか。", "{day}{hour}の{room}の空きを{who}さんに教えて。",
              "{who}ですが、{day}の{hour}に{room}は空いていますか。", "会議室{room}、{day}の{hour}、{who}、確認。",
              "{room}が{day}{hour}に取られているか、{who}さんが聞いています。", "{hour}の{room}は空きですか。{day}、{who}です。",
              "{room}は{who}さんが使えますか。{day}の{hour}です。", "{who}です。{room}が{day}{hour}に空いているか教えて。",
              "{day}の{room}は空いていますか。{hour}に{who}さんが使います。", "{hour}に{room}は使えますか。{day}、{who}さんの分です。",
              "{who}さんに、{day}の{hour}の{room}が空いているか教えてください。", "{room}、{day}{hour}、{who}さんが使えるか見てください。"],
}  # fmt: skip
JA_HELD = {
    "book": ["{room}を{day}の{hour}に{who}さんで予約してください。", "{who}です。{day}{hour}に{room}を取ってください。",
             "{day}の{hour}から{room}をお願いします。{who}です。"],
    "cancel": ["{who}さんの{room}、{day}の{hour}を取り消してください。", "{who}です。{day}{hour}の{room}をキャンセルして。",
               "{day}の{hour}の{room}は不要です。{who}さんの分です。"],
    "check": ["{room}は{day}の{hour}に{who}さんが使えますか。", "{who}です。{day}{hour}の{room}は空いていますか。",
              "{day}の{hour}に{room}が空いているか、{who}さんに教えて。"],
}  # fmt: skip

# Requests put together from parts, so that what says the verb and the order of the rest vary apart.
# Orders and verbs of the held-out phrasings are not among them.
ENDS = ["for {who} on {day} at {hour}", "for {who} at {hour} on {day}", "at {hour} on {day} for {who}",
        "at {hour} for {who} on {day}"]  # fmt: skip
WHENS = ["on {day} at {hour}", "{day} at {hour}", "on {day}, {hour}"]
ORDERS = {
    "book": ["Book {room}", "Reserve {room}", "Please get {room}", "Could you reserve {room}"],
    "cancel": ["Cancel {room}", "Drop {room}", "Please free {room}", "Could you cancel {room}"],
    "check": ["Check {room}", "Is {room} open", "Please see if {room} is free", "Could you look if {room} is taken"],
}  # fmt: skip
SUBJECTS = {
    "book": ["{who} needs {room}", "{who} would like {room}", "{who} would like to use {room}", "{who} hopes to get {room}",
             "{who} wants {room}"],
    "cancel": ["{who} no longer needs {room}", "{who} does not want {room}", "{who} does not require {room}",
               "{who} will not need {room}", "{who} has no need of {room}"],
    "check": ["{who} asks if {room} is free", "{who} would like to know if {room} is taken", "{who} wants to know: is {room} open",
              "Tell {who} whether {room} is available", "{who} asks whether {room} is booked"],
}  # fmt: skip
TWO = {
    "book": ["I would like to have {room} {when}. It is for {who}.", "We need {room} {when}. {who} will come."],
    "cancel": ["{room} is not needed {when}. It was for {who}.", "Free {room} {when}. {who} is away."],
    "check": ["Is {room} booked {when}? {who} would like to know.", "Is {room} open {when}? {who} asks.",
              "Can I have {room} {when}? My name is {who}.", "Is {room} taken {when}? It is for {who}."],
}  # fmt: skip
WHENS_JA = ["{day}{hour}", "{day}の{hour}"]
TOPICS_JA = {
    "book": ["{room}を{when}に{who}さんの名前で取って。", "{room}を{when}、{who}さんで押さえてください。",
             "{when}の{room}を{who}さんで予約します。", "{who}さんが{room}を{when}に予約したいそうです。",
             "{when}に{who}さんで{room}を取りたいです。", "{room}は{when}に{who}さんが使います。"],
    "cancel": ["{room}を{when}に使う{who}さんの予約をやめて。", "{room}は{when}、{who}さんには不要になりました。",
               "{when}の{room}を{who}さんは使いません。", "{who}さんが{room}の{when}を取り消したいそうです。",
               "{when}の{who}さんの{room}はもういりません。", "{who}です。{when}の{room}はいりません。",
               "{who}ですが、{when}の{room}をキャンセルします。", "{room}の{when}をキャンセルしたいです。{who}です。"],
    "check": ["{room}を{when}に{who}さんが使えるか見て。", "{room}は{when}、{who}さんに使えるでしょうか。",
              "{when}の{room}が空きかを{who}さんが聞いています。", "{who}さんが{room}の{when}の空きを知りたいそうです。",
              "{when}に{who}さんは{room}を使えますか。", "{room}は{when}に{who}さんで取れますか。"],
}  # fmt: skip


def phrasing(rng: random.Random, verb: str, japanese: bool) -> str:
    """A way to ask: one of the fixed ones, or put together."""
    if rng.random() < 0.5:
        return rng.choice((JA if japanese else EN)[verb])
    if japanese:
        return rng.choice(TOPICS_JA[verb]).replace("{when}", rng.choice(WHENS_JA))
    end = "?" if verb == "check" else "."
    form = rng.random()
    if form < 0.4:
        return f"{rng.choice(ORDERS[verb])} {rng.choice(ENDS)}{end}"
    if form < 0.7:
        return rng.choice(TWO[verb]).replace("{when}", rng.choice(WHENS))
    return f"{rng.choice(SUBJECTS[verb])} {rng.choice(WHENS)}{end}"


Slots = tuple[str, str, str, int]


def say_hour(rng: random.Random, hour: int, japanese: bool) -> str:
    """An hour as people say it."""
    if japanese:
        if rng.random() < 0.5:
            return f"{hour}時"
        return f"午前{hour}時" if hour < 12 else f"午後{hour - 12}時" if hour > 12 else "12時"
    if rng.random() < 0.5:
        return f"{hour}:00"
    return f"{hour} am" if hour < 12 else f"{hour - 12} pm" if hour > 12 else "noon"


def rows(
    rng: random.Random, count: int, *, held: bool, new: bool, taken: set[Slots]
) -> list[dict[str, object]]:
    """Rows half English, half Japanese, in combinations that are not in `taken`, which grows."""
    made: list[dict[str, object]] = []
    while len(made) < count:
        japanese = len(made) % 2 == 1
        if new:
            rooms, people = (
                (NEW_ROOMS_JA, NEW_PEOPLE_JA) if japanese else (NEW_ROOMS_EN, NEW_PEOPLE_EN)
            )
        else:
            rooms, people = (ROOMS_JA, PEOPLE_JA) if japanese else (ROOMS_EN, PEOPLE_EN)
        verb = rng.choice(sorted(EN))
        room, who, hour = rng.choice(rooms), rng.choice(people), rng.choice(HOURS)
        code, english, kanji = rng.choice(DAYS)
        slots = (room, who, code, hour)
        if slots in taken:
            continue
        taken.add(slots)
        day = (kanji + rng.choice(["", "日"])) if japanese else english
        known = phrasing(rng, verb, japanese)
        text = rng.choice((JA_HELD if japanese else EN_HELD)[verb]) if held else known
        ask = text.format(room=room, who=who, day=day, hour=say_hour(rng, hour, japanese))
        answer = f"{verb} | {room} | {who} | {code} | {hour}"
        made.append(
            {
                "messages": [
                    {"role": "user", "content": ask},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    return made


def make() -> dict[str, str]:
    """File name → its text."""
    rng = random.Random("booking desk")
    taken: set[Slots] = set()
    parts = {
        "train.jsonl": rows(rng, 2000, held=False, new=False, taken=taken),
        "heldout.jsonl": rows(rng, 240, held=True, new=False, taken=taken),
        "heldout_new_words.jsonl": rows(rng, 160, held=True, new=True, taken=taken),
    }
    return {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        for name, made in parts.items()
    }


if __name__ == "__main__":
    for name, text in make().items():
        (OUT / name).write_text(text, encoding="utf-8")
        print(f"{name}: {text.count(chr(10))} rows")
