# ruff: noqa: E501
"""Each rule on a text that it drops and on its likes that stay, in English, Chinese, Japanese, Korean and code."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.build import build
from data_pipeline.config import DataConfig, SourceConfig, StagesConfig, TokenizerConfig
from data_pipeline.document import batch_of
from data_pipeline.filters.config import (
    C4Config,
    CodeConfig,
    FiltersConfig,
    FineWebConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    LanguageConfig,
    LengthConfig,
    Pii,
)
from data_pipeline.filters.pii import mask
from data_pipeline.filters.stage import filter_batch
from parallel.common.errors import ConfigError, UserError

CORPORA = Path(__file__).parents[3] / "shared" / "corpora"
ENGLISH = (
    "The furnace stands at the edge of the village, and the men who work there begin before the sun is up. "
    "They carry ore and charcoal to the top of the stack, where a boy keeps count of every basket.\n"
    "Air comes from two bellows that a water wheel drives. It takes most of a day until the bloom is ready to be drawn.\n"
    "Then everybody lends a hand, because iron waits for nobody. What is left of the slag goes to the road."
)
CHINESE = (
    "冶铁的炉子建在村子的边上，工人们在太阳升起之前就开始干活了。他们把矿石和木炭一篮一篮地背到炉顶，有一个孩子在那里数数。\n"  # noqa: RUF001
    "风是由水轮带动的两个风箱送来的，要差不多一整天的时间，铁块才能取出来。\n"  # noqa: RUF001
    "这时候大家都来帮忙，因为铁是不等人的。剩下的炉渣就用来铺路，第二天又从头开始。"  # noqa: RUF001
)
JAPANESE = (
    "製鉄の炉は村のはずれにあり、働く人たちは日の出の前に仕事を始める。鉱石と炭を炉の上まで運び、一人の少年が籠の数を数えている。\n"
    "風は水車で動く二つのふいごから送られ、鉄の塊を取り出せるまでにはほとんど一日かかる。\n"
    "その時はみんなが手を貸す。鉄は誰も待ってくれないからである。残った鉱滓は道に敷かれる。"
)
KOREAN = (
    "제철로는 마을의 끝에 있고 일하는 사람들은 해가 뜨기 전에 일을 시작한다. 그들은 광석과 숯을 화로의 꼭대기까지 나르고 "
    "한 소년이 바구니의 수를 센다.\n바람은 물레방아로 움직이는 두 개의 풀무에서 나오며 쇳덩이를 꺼내기까지는 거의 하루가 걸린다. "
    "그때는 모두가 손을 빌려준다. 쇠는 아무도 기다리지 않기 때문이다. 남은 찌꺼기는 길에 깔리고 다음 날에 모든 일이 다시 처음부터 "
    "시작된다. 겨울에는 강이 얼어서 물레방아가 멈추고 사람들은 집에서 연장을 고치며 봄을 기다린다. 봄이 오면 아이들도 산에 "
    "올라가 나무를 베고 숯을 굽는 일을 배우기 시작한다."
)
PYTHON = "\n".join(f"def smelt_{name}(ore, coal):\n    return ore * {name} + coal[{name}]\n" for name in range(12))
WRITTEN = {"en": ENGLISH, "zh": CHINESE, "ja": JAPANESE, "ko": KOREAN, "code": PYTHON}
EVERYTHING = FiltersConfig(
    length=LengthConfig(min_words=40),
    gopher_quality=GopherQualityConfig(enabled=True),
    gopher_repetition=GopherRepetitionConfig(enabled=True),
    c4=C4Config(enabled=True, min_sentences=3),
    fineweb=FineWebConfig(enabled=True),
    code=CodeConfig(enabled=True),
    language=LanguageConfig(keep=("en", "zh", "ja", "ko")),
)


def why(text: str, settings: FiltersConfig, language: str | None = None) -> str | None:
    """The reason for which a text is dropped."""
    found = filter_batch(batch_of(["id"], [text]), settings, language)
    assert found.batch.num_rows == (not found.dropped)
    return found.dropped[0][0] if found.dropped else None


@pytest.mark.parametrize("language", list(WRITTEN))
def test_good_texts_of_every_kind_pass_all_rules(language: str) -> None:
    assert why(WRITTEN[language], EVERYTHING, language) is None
    if language != "code":
        assert why(WRITTEN[language], EVERYTHING) is None


QUALITY = FiltersConfig(gopher_quality=GopherQualityConfig(enabled=True))
REPETITION = FiltersConfig(gopher_repetition=GopherRepetitionConfig(enabled=True))
C4 = FiltersConfig(c4=C4Config(enabled=True))
FINEWEB = FiltersConfig(fineweb=FineWebConfig(enabled=True))


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("only a few words here", QUALITY, "gopher quality: fewer words than allowed"),
        (CHINESE[:60], QUALITY, "gopher quality: fewer words than allowed"),
        ("pneumonoultramicroscopic " * 60, QUALITY, "gopher quality: mean word length"),
        (ENGLISH.replace(" ", " # ", 20), QUALITY, "gopher quality: symbols"),
        ("\n".join(f"- the {n}th argument against another furnace in this valley" for n in range(9)), QUALITY, "gopher quality: bullet points"),
        (ENGLISH.replace(".\n", "...\n"), QUALITY, "gopher quality: lines that end with an ellipsis"),
        (CHINESE.replace("。\n", "……\n"), QUALITY, "gopher quality: lines that end with an ellipsis"),
        (ENGLISH + " 1850 1851 1852 1853" * 8, QUALITY, "gopher quality: words without letters"),
        ("furnace ore slag coal iron hammer bloom anvil " * 10, QUALITY, "gopher quality: stop words"),
        ("鐵爐礦石炭風水輪村" * 20, QUALITY, "gopher quality: stop words"),
        ("the same line again\n" * 4 + ENGLISH, REPETITION, "gopher repetition: duplicate lines"),
        ("\n\n".join([ENGLISH.split("\n")[0]] * 3 + ["a", "b", "c", "d", "e", "f"]), REPETITION, "gopher repetition: characters in duplicate lines"),
        ("buy iron now " * 5 + ENGLISH[:80], REPETITION, "gopher repetition: the commonest 2-gram"),
        ("打铁请来找我们" * 6 + CHINESE[:70], REPETITION, "gopher repetition: the commonest 3-gram"),
        (ENGLISH + " " + ENGLISH.split("\n")[0] + " so it was told.", REPETITION, "gopher repetition: repeated 5-grams"),
        (ENGLISH + " Lorem ipsum dolor sit amet.", C4, "c4: lorem ipsum"),
        (ENGLISH + " if (x) { y }", C4, "c4: curly bracket"),
        ("The sentence never ends and goes on and on\n" * 9, C4, "c4: too few sentences"),
        ("privacy policy\ncookie policy", C4, "c4: no line is left"),
        ("no end here\nnor there is one\nand so it goes on in this text", FINEWEB, "fineweb: lines without punctuation"),
        ("short one.\n" + "\n".join(f"so short {n}." for n in range(9)), FINEWEB, "fineweb: short lines"),
        ((ENGLISH.split("\n")[0] + "\n") * 2 + ENGLISH, FINEWEB, "fineweb: characters in duplicate lines"),
    ],
)  # fmt: skip
def test_bad_texts_are_dropped_by_name(text: str, settings: FiltersConfig, reason: str) -> None:
    assert why(text, settings) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = '" + "a" * 2000 + "'\n" + PYTHON, "code: a very long line"),
        ("\n".join("value = " + "call(x) + " * 15 for _ in range(9)), "code: long lines"),
        ("\n".join("[[],[],{},(),--,++,**,//,<<,>>]" for _ in range(9)), "code: few letters and digits"),
    ],
)
def test_code_has_rules_of_its_own(text: str, reason: str) -> None:
    settings = FiltersConfig(code=CodeConfig(enabled=True))
    assert why(text, settings, "code") == reason
    assert why(text, settings, "en") is None


def test_lines_that_c4_takes_out_leave_the_rest_as_it_was() -> None:
    settings = FiltersConfig(c4=C4Config(enabled=True, min_sentences=1))
    found = filter_batch(
        batch_of(["a"], [f"Menu\n{ENGLISH}\nRead our privacy policy before you go on.\n"]), settings, None
    )
    assert found.batch.column("text").to_pylist() == [ENGLISH + "\n"]
    assert found.changed == 1


def test_languages_are_told_apart_and_a_source_can_ask_for_its_own() -> None:
    german = "Der Ofen steht am Rand des Dorfes, und die Leute fangen an, bevor die Sonne aufgegangen ist."
    settings = FiltersConfig(language=LanguageConfig(keep=("en", "zh")))
    texts = [ENGLISH, german, CHINESE, JAPANESE, KOREAN]
    found = filter_batch(batch_of(list("abcde"), texts), settings, None)
    assert found.batch.column("id").to_pylist() == ["a", "c"]
    assert [reason for reason, *_ in found.dropped] == ["language: de", "language: ja", "language: ko"]
    assert dict(found.languages) == {"en": 1, "de": 1, "zh": 1, "ja": 1, "ko": 1}
    assert filter_batch(batch_of(list("abcde"), texts), settings, "de").batch.column("id").to_pylist() == ["b"]
    counted = filter_batch(batch_of(list("abcde"), texts), FiltersConfig(language=LanguageConfig(identify=True)), None)
    assert counted.batch.num_rows == 5
    assert counted.languages["ko"] == 1


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to anna.b+c@mail.example.org, please", "write to <EMAIL>, please"),
        ("the @property of x@y is 3", "the @property of x@y is 3"),
        ("from 8.8.8.8 and 2001:4860:4860::8888 it came", "from <IP> and <IP> it came"),
        ("on 127.0.0.1, 10.0.0.7, 999.1.1.1 and version 1.2.3.4.5", "on 127.0.0.1, 10.0.0.7, 999.1.1.1 and version 1.2.3.4.5"),
        ("call +44 20 7946 0958 or (212) 555-0123", "call <PHONE> or <PHONE>"),
        ("电话13912345678，价格12345678901", "电话<PHONE>，价格12345678901"),  # noqa: RUF001
        ("on 2024-05-06 it cost 1,234,567.89 for 10-20-30", "on 2024-05-06 it cost 1,234,567.89 for 10-20-30"),
        ("id 11010519491231002X and 110105194912310021", "id <NATIONAL_ID> and 110105194912310021"),
        ("account DE89 3704 0044 0532 0130 00 or GB00 1234", "account <NATIONAL_ID> or GB00 1234"),
        ("SSN 078-05-1120, not 000-12-3456", "SSN <NATIONAL_ID>, not 000-12-3456"),
    ],
)  # fmt: skip
def test_personal_data_is_masked_and_its_likes_are_not(text: str, masked: str) -> None:
    found, counts = mask(text, tuple(Pii))
    assert found == masked
    assert sum(counts.values()) == masked.count("<")
    assert mask(text, ()) == (text, {})


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)))
    return path


def config(tmp_path: Path, file: Path, stages: StagesConfig) -> DataConfig:
    return DataConfig(
        sources=[SourceConfig(name="web", path=str(file))],
        store=str(tmp_path / "store"),
        stages=stages,
        tokenizer=TokenizerConfig(vocabulary_size=384),
    )


def test_a_build_counts_and_shows_what_its_filters_did(tmp_path: Path) -> None:
    texts = (
        [f"{ENGLISH} Note {n}: write to man{n}@iron.example." for n in range(30)] + ["the word " * 40] * 5 + [KOREAN]
    )
    settings = replace(EVERYTHING, mask=(Pii.email,), language=LanguageConfig(keep=("en",)), c4=C4Config())
    stages = StagesConfig(filters=settings, exact_dedup=False)
    stages = replace(stages, near_dedup=replace(stages.near_dedup, enabled=False))
    store = build(config(tmp_path, write(tmp_path / "a.jsonl", texts), stages))
    report = json.loads((store.path / "report.json").read_text())["stages"]["filters"]
    assert report["counts"]["sources"]["web"]["kept"]["documents"] == 30
    dropped = report["counts"]["sources"]["web"]["dropped"]
    assert {reason: facts["documents"] for reason, facts in dropped.items()} == {
        "gopher repetition: the commonest 2-gram": 5,
        "language: ko": 1,
    }
    assert report["counts"]["samples"]["language: ko"][0]["text"] == KOREAN[:200]
    assert report["languages"] == {"web": {"en": 35, "ko": 1}}
    assert report["masked"] == {"web": {"email": 30}}


def test_a_source_that_loses_nearly_all_stops_the_build_and_says_so(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", [f"{ENGLISH} {n}" for n in range(4)] + [f"much too short, number {n}" for n in range(196)]
    )
    stages = StagesConfig(filters=FiltersConfig(length=LengthConfig(min_words=20)))
    with pytest.raises(
        UserError, match=r"the stage filters drops 196 of the 200 documents of the data source web"
    ) as told:
        build(config(tmp_path, file, stages))
    assert "fewer than 20 words" in str(told.value)
    assert not (tmp_path / "store" / "manifest.jsonl").exists()
    build(config(tmp_path, file, replace(stages, max_dropped_share=1.0)))


def test_senseless_settings_are_refused(tmp_path: Path) -> None:
    filters = FiltersConfig(
        length=LengthConfig(min_words=9, max_words=3), language=LanguageConfig(keep=("English",), min_confidence=2)
    )
    with pytest.raises(ConfigError) as told:
        build(config(tmp_path, tmp_path, StagesConfig(filters=filters)))
    assert [problem.key for problem in told.value.problems] == [
        "data.stages.filters.language.min_confidence",
        "data.stages.filters.language.keep",
        "data.stages.filters.length.max_words",
    ]


@pytest.mark.truth
@pytest.mark.parametrize(
    ("name", "language", "least"), [("en_rfcs", None, 0.7), ("zh_vue_docs", "zh", 0.55), ("code_python", "code", 0.8)]
)
def test_most_of_a_good_corpus_stays(name: str, language: str | None, least: float) -> None:
    file = CORPORA / f"{name}.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{file} is not there: the real corpora are kept beside the repository")
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        texts = [json.loads(line)["text"] for line in opened][:150]
    # Documentation repeats its code fences line by line: the repetition rules are for prose.
    settings = FiltersConfig(
        gopher_quality=GopherQualityConfig(enabled=True),
        gopher_repetition=GopherRepetitionConfig(enabled=language is None),
        code=CodeConfig(enabled=True),
    )
    found = filter_batch(batch_of([str(number) for number in range(len(texts))], texts), settings, language)
    assert found.batch.num_rows >= least * len(texts), [reason for reason, *_ in found.dropped]
