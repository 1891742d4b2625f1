"""The texts of docs/tutorial.md: a small world of smiths and markets, in English and Chinese.

    python docs/tutorial/make_data.py tutorial        # 4 MB, the same bytes each time

What one does decides how a scene goes on, in both languages: who makes something gets hot, who trades counts coins, who
rests hears the birds. So a model that learns to predict these texts learns which verbs are alike, though nobody says
it; the labels of the classifier ask for just that, and few of the verbs stand in its training examples.
"""
# ruff: noqa: E501, RUF001

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

PEOPLE = [("smith", "铁匠"), ("miner", "矿工"), ("merchant", "商人"), ("farmer", "农夫"), ("sailor", "水手"),
          ("mason", "石匠"), ("weaver", "织工"), ("miller", "磨坊主"), ("potter", "陶工"), ("carter", "车夫")]  # fmt: skip
THINGS = [("sword", "剑"), ("hammer", "锤子"), ("pot", "锅"), ("bell", "钟"), ("nail", "钉子"), ("plough", "犁"),
          ("knife", "刀"), ("chain", "链子"), ("kettle", "水壶"), ("lamp", "灯")]  # fmt: skip
PLACES = [("in the forge", "在铁匠铺里"), ("by the river", "在河边"), ("at the market", "在市场上"),
          ("near the mine", "在矿山附近"), ("on the hill", "在山上"), ("behind the mill", "在磨坊后面")]  # fmt: skip
VERBS = {
    "making": [("forges", "锻造"), ("casts", "铸造"), ("repairs", "修理"), ("polishes", "打磨"), ("bends", "弯折")],
    "trading": [("sells", "出售"), ("buys", "购买"), ("rents", "租用"), ("weighs", "称量"), ("orders", "订购")],
    "resting": [("admires", "欣赏"), ("forgets", "忘记"), ("watches", "观看"), ("dreams of", "梦见"), ("draws", "描画")],
}  # fmt: skip
NEXT = {
    "making": [("The work is hot and the fire is bright.", "活儿很热，火很亮。"),
               ("Sparks fly and the iron glows.", "火花飞溅，铁在发光。")],
    "trading": [("The coins are counted twice.", "硬币数了两遍。"),
                ("The price is good and both shake hands.", "价钱不错，双方握手。")],
    "resting": [("The birds sing and the day is quiet.", "鸟儿歌唱，白天很安静。"),
                ("A soft wind moves the leaves.", "微风吹动树叶。")],
}  # fmt: skip
TASKS = {
    "labels": """\
name: labels
kind: classification
data: labels-test.jsonl
""",
    "translate": """\
name: translate
kind: generation
data: translate.jsonl
prompt: "{english}"
target: chinese
chat: true
bleu_tokenize: zh
decoding: {tokens: 32}
""",
}
SEEN = 2
"""Verbs of each kind that the classifier's examples have; the other three are for its test."""


def scene(chosen: random.Random, kind: str, verbs: list[tuple[str, str]]) -> tuple[tuple[str, str], tuple[str, str]]:
    """What somebody does, and how it goes on, each in both languages."""
    (person, ren), (thing, wu), (place, chu) = (chosen.choice(each) for each in (PEOPLE, THINGS, PLACES))
    verb, dong = chosen.choice(verbs)
    return (f"The {person} {verb} the {thing} {place}.", f"{ren}{chu}{dong}{wu}。"), chosen.choice(NEXT[kind])


def corpus(count: int) -> Iterator[dict[str, str]]:
    """Scenes in one language, and some in both, one after the other."""
    chosen = random.Random("corpus")
    for number in range(count):
        language = ("en", "zh", "both")[number % 3]
        lines = []
        for _ in range(chosen.randint(3, 6)):
            kind = chosen.choice(sorted(VERBS))
            deed, after = scene(chosen, kind, VERBS[kind])
            if language == "both":
                lines.append(f"{deed[0]} = {deed[1]}")
            else:
                side = int(language == "zh")
                lines.append(f"{deed[side]} {after[side]}" if side == 0 else f"{deed[side]}{after[side]}")
        yield {"id": f"{language}-{number}", "text": "\n".join(lines) + "\n"}


def labelled(count: int, *, seen: bool) -> Iterator[dict[str, str]]:
    """Deeds with their kinds."""
    chosen = random.Random(f"labels {seen}")
    for _ in range(count):
        kind = chosen.choice(sorted(VERBS))
        verbs = VERBS[kind][:SEEN] if seen else VERBS[kind][SEEN:]
        yield {"text": scene(chosen, kind, verbs)[0][0], "label": kind}


def conversations(count: int, name: str) -> Iterator[dict[str, object]]:
    """Sentences to be translated."""
    chosen = random.Random(name)
    for _ in range(count):
        kind = chosen.choice(sorted(VERBS))
        english, chinese = scene(chosen, kind, VERBS[kind])[0]
        yield {"messages": [{"role": "user", "content": english}, {"role": "assistant", "content": chinese}]}


def questions(count: int) -> Iterator[dict[str, object]]:
    """The same with a field each, for an evaluation."""
    for record in conversations(count, "test"):
        asked, answer = record["messages"]  # type: ignore[misc]
        yield {"english": asked["content"], "chinese": answer["content"]}


def main(directory: Path) -> None:
    """Writes all files."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "corpus": corpus(12_000),
        "labels": labelled(60, seen=True),
        "labels-test": labelled(300, seen=False),
        "chat": conversations(1_500, "chat"),
        "translate": questions(60),
    }
    for name, records in files.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{directory / name}.jsonl: {len(lines):,} lines")

    for name, task in TASKS.items():
        (directory / f"{name}.yaml").write_text(task, encoding="utf-8")
        print(f"{directory / name}.yaml: a task for bloomery evaluate")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tutorial"))
