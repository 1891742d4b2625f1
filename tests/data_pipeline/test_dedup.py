"""Deduplication against brute force: all pairs, plain Python, on made documents and on real ones with exact truth."""

import csv
import gzip
import json
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import document
from data_pipeline.config import NearDedupConfig
from data_pipeline.dedup.clusters import write_clusters
from data_pipeline.dedup.exact import deduplicate_exactly
from data_pipeline.dedup.near import deduplicate_nearly
from data_pipeline.dedup.removed import Removal
from data_pipeline.dedup.shingles import shingle_sets, sketch
from data_pipeline.document import Parts, PartWriter, batch_of

CORPORA = Path(__file__).parents[3] / "shared" / "corpora"
UNSPACED = r"\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U000323af"
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
CERTAIN = NearDedupConfig(bands=60, rows=2)
"""Misses a pair at Jaccard 0.8 with probability 1e-27: what the walk itself does can be compared exactly."""

Document = tuple[str, str, str]
"""Source, id, text."""


class Silent:
    """A meter that nobody sees."""

    def advance(self, amount: int) -> None:
        pass


def shingles_of(text: str, ngram: int = 5) -> frozenset[tuple[str, ...]]:
    """The definition, in words of Python."""
    text = unicodedata.normalize("NFC", text).lower()
    tokens = TOKEN.findall(text)
    if len(tokens) < ngram:
        return frozenset([(text,)])
    return frozenset(tuple(tokens[start : start + ngram]) for start in range(len(tokens) - ngram + 1))


def jaccard_of(first: frozenset, second: frozenset) -> float:
    return len(first & second) / len(first | second)


def greedy_oracle(documents: Sequence[Document], resembling: set[frozenset[str]]) -> set[str]:
    """Ids that are kept: in the order of source, longest, id, whatever resembles nothing kept before."""
    sources = list(dict.fromkeys(source for source, _, _ in documents))
    kept: set[str] = set()
    for _, identifier, _ in sorted(documents, key=lambda doc: (sources.index(doc[0]), -len(doc[2]), doc[1])):
        if not any(frozenset((identifier, other)) in resembling for other in kept):
            kept.add(identifier)
    return kept


def all_pairs(documents: Sequence[Document], threshold: float) -> set[frozenset[str]]:
    """Every pair of ids at or above the threshold."""
    sets = {identifier: shingles_of(text) for _, identifier, text in documents}
    return {
        frozenset(pair) for pair in combinations(sets, 2) if jaccard_of(*(sets[name] for name in pair)) >= threshold
    }


@contextmanager
def parts_of(documents: Sequence[Document], batch: int = 7):
    """The documents as a stage's output, a few in a batch, and an empty directory."""
    with tempfile.TemporaryDirectory() as name:
        directory, output = Path(name) / "parts", Path(name) / "out"
        directory.mkdir()
        output.mkdir()
        writer = PartWriter(directory)
        for source in dict.fromkeys(source for source, _, _ in documents):
            mine = [doc for doc in documents if doc[0] == source]
            for start in range(0, len(mine), batch):
                _, ids, texts = zip(*mine[start : start + batch], strict=True)
                writer.write(source, batch_of(ids, texts))
        yield Parts(directory, writer.close()), output


def near(documents: Sequence[Document], config: NearDedupConfig, batch: int = 7) -> tuple[set[str], list[tuple]]:
    """Kept ids, and (removed id, kept id, Jaccard)."""
    with parts_of(documents, batch) as (parts, output):
        everything = np.ones(parts.rows, dtype=bool)
        outcome = deduplicate_nearly(parts, everything, config, output, Silent())  # type: ignore[arg-type]
        removal = Removal.read(output)
        assert sorted(file.name for file in output.iterdir()) == ["bands.bin", "removed.parquet"]
        ids = parts.ids(np.arange(parts.rows))
        everything[removal.row] = False
        columns = (parts.ids(removal.row), parts.ids(removal.kept_row), removal.jaccard.tolist())
        rows = list(zip(*columns, strict=True))
        counted = sum(entry["kept"]["documents"] for entry in outcome["counts"]["sources"].values())
        assert counted == everything.sum()
        return {ids[row] for row in np.flatnonzero(everything)}, rows


def text_sets(texts: Sequence[str], ngram: int = 5) -> list[set[int]]:
    array = pa.array(texts, pa.large_string())
    return [set(found.tolist()) for found in shingle_sets(array, np.arange(len(texts)), ngram=ngram)]


WORDS = st.sampled_from(
    ["The", "iron", "furnace", "x_1", "中", "文字", "カナ", "한국", "É", "İstanbul", "ΣΑΣ", "straße", "𠀀", "42"]
)
BETWEEN = st.sampled_from([" ", "\n", ", ", "-", "", "。", "\U0001f600", "\u0301"])
SENTENCE = st.lists(st.tuples(WORDS, BETWEEN), max_size=25).map(lambda pairs: "".join(a + b for a, b in pairs))


@given(st.lists(SENTENCE, min_size=1, max_size=4), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_the_kernel_finds_the_shingles_of_the_definition(texts: list[str], ngram: int) -> None:
    found = text_sets(texts, ngram)
    wanted = [shingles_of(text, ngram) for text in texts]
    assert [len(entry) for entry in found] == [len(entry) for entry in wanted]
    for i in range(len(texts)):
        for j in range(i):
            assert jaccard_of(frozenset(found[i]), frozenset(found[j])) == jaccard_of(wanted[i], wanted[j])


def test_every_character_has_the_class_of_the_definition() -> None:
    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    joined = " ".join(letters)
    wanted = len(set(TOKEN.findall(unicodedata.normalize("NFC", joined).lower())))
    assert len(text_sets([joined], ngram=1)[0]) == wanted


def test_a_signature_follows_from_the_text_alone() -> None:
    texts = ["Plain text of some words that go on", "Das Gleiche auf Deutsch, größer", "短い文章ですが十分に長い"]
    array = pa.array(["", *texts, "after"], pa.large_string())
    options = {"ngram": 5, "bands": 4, "rows_per_band": 3}
    together, characters = sketch(array, np.array([1, 2, 3]), **options)
    for number, text in enumerate(texts):
        alone, _ = sketch(pa.array([text], pa.large_string()), np.array([0]), **options)
        assert alone.tolist() == [together[number].tolist()]
    assert characters.tolist() == [len(text) for text in texts]
    # Fixed for all time: other numbers would mean that stores cannot be compared any more.
    assert together[0].tolist() == [
        13417018996562753436,
        1215841276111150703,
        1535685871376636183,
        15972462422060098547,
    ]


@st.composite
def families(draw: st.DrawFn) -> list[Document]:
    """Documents that are variants of a few: words exchanged, cut, put on, so that chains and stars arise."""
    words = [f"w{number}" for number in range(30)]
    base = [draw(st.lists(st.sampled_from(words), min_size=6, max_size=40)) for _ in range(draw(st.integers(1, 3)))]
    documents = []
    for number in range(draw(st.integers(2, 16))):
        text = list(draw(st.sampled_from(base)))
        for _ in range(draw(st.integers(0, 2))):
            place = draw(st.integers(0, len(text) - 1))
            text[place] = draw(st.sampled_from(words))
        text = text[draw(st.integers(0, 1)) :] + draw(st.lists(st.sampled_from(words), max_size=2))
        documents.append((draw(st.sampled_from("pq")), f"d{number:02d}", " ".join(text)))
    first = documents[0][0]
    return sorted(documents, key=lambda doc: doc[0] != first)


@given(families(), st.sampled_from([0.5, 0.7, 0.8, 1.0]))
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_the_greedy_independent_set(documents: list[Document], threshold: float) -> None:
    kept, removed = near(documents, NearDedupConfig(threshold=threshold, bands=100, rows=1))
    assert kept == greedy_oracle(documents, all_pairs(documents, threshold))
    texts = {identifier: shingles_of(text) for _, identifier, text in documents}
    for identifier, twin, jaccard in removed:
        assert twin in kept
        assert jaccard == jaccard_of(texts[identifier], texts[twin]) >= threshold


def test_chains_keep_what_resembles_nothing_kept() -> None:
    words = [f"w{number}" for number in range(60)]
    chain = [("s", f"d{step}", " ".join(words[4 * step : 4 * step + 44])) for step in range(4)]
    kept, removed = near(chain, CERTAIN)
    assert kept == greedy_oracle(chain, all_pairs(chain, 0.8))
    assert len(kept) >= 2
    assert len(removed) >= 1


def test_a_large_family_leaves_one_and_strangers_stay() -> None:
    body = " ".join(f"w{number}" for number in range(300))
    family = [("s", f"f{number:04d}", f"same {body} n{number:04d}") for number in range(600)]
    strangers = [("s", f"x{number:04d}", " ".join(f"u{number}_{i}" for i in range(50))) for number in range(600)]
    kept, removed = near([*family, *strangers], NearDedupConfig(), batch=100)
    assert kept == {"f0000"} | {identifier for _, identifier, _ in strangers}
    assert {twin for _, twin, _ in removed} == {"f0000"}


def test_the_result_does_not_depend_on_threads_or_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"w{number}" for number in range(80)]
    spans = [(number % 9, number % 9 + 40 + number % 5) for number in range(90)]
    documents = [("s", f"d{number:03d}", " ".join(words[start:stop])) for number, (start, stop) in enumerate(spans)]
    expected = near(documents, CERTAIN, batch=90)
    for workers, batch in ((1, 90), (5, 4)):
        monkeypatch.setattr(document, "workers", lambda count=workers: count)
        assert near(documents, CERTAIN, batch=batch) == expected


def test_of_equal_texts_the_first_source_and_the_smallest_id_stay() -> None:
    documents = [
        ("b", "3", "same text"),
        ("b", "1", "same text"),
        ("b", "2", "other text"),
        ("a", "0", "same text"),
        ("a", "9", "third text"),
        ("a", "8", "third text"),
    ]
    with parts_of(documents, batch=2) as (parts, output):
        outcome = deduplicate_exactly(parts, output, Silent())  # type: ignore[arg-type]
        removal = Removal.read(output)
        pairs = list(zip(parts.ids(removal.row), parts.ids(removal.kept_row), strict=True))
    assert sorted(pairs) == [("0", "1"), ("3", "1"), ("9", "8")]
    assert outcome["counts"]["sources"]["b"] == {
        "kept": {"documents": 2, "text_bytes": 19},
        "dropped": {"with the text of another": {"documents": 1, "text_bytes": 9}},
    }
    sample = outcome["counts"]["samples"]["with the text of another"][0]
    assert sample == {"source": "b", "id": "3", "kept_id": "1", "jaccard": 1.0, "text": "same text"}


def test_the_table_of_clusters_names_a_document_that_is_kept() -> None:
    words = " ".join(f"w{number}" for number in range(40))
    documents = [
        ("a", "1", f"{words} and more"),
        ("a", "2", words),
        ("b", "3", words),
        ("b", "4", "nothing like it at all"),
    ]
    with parts_of(documents) as (parts, output):
        deduplicate_exactly(parts, output, Silent())  # type: ignore[arg-type]
        exact = Removal.read(output)
        kept = np.ones(parts.rows, dtype=bool)
        kept[exact.row] = False
        deduplicate_nearly(parts, kept, CERTAIN, output, Silent())  # type: ignore[arg-type]
        write_clusters(parts, {"exact": exact, "near": Removal.read(output)}, output / "clusters.parquet")
        table = pq.read_table(output / "clusters.parquet").to_pylist()
    columns = ("removed_id", "kept_id", "jaccard", "removed_source", "kept_source", "stage")
    assert [tuple(row[column] for column in columns) for row in table] == [
        ("2", "1", 36 / 38, "a", "a", "near"),
        ("3", "1", 36 / 38, "b", "a", "exact"),
    ]


def records_of(name: str) -> list[dict[str, str]]:
    file = CORPORA / f"{name}.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{file} is not there: the real corpora are kept beside the repository")
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        return [json.loads(line) for line in opened]


@pytest.mark.truth
@pytest.mark.parametrize("name", ["dup_docs_versions", "code_python", "dup_licenses", "zh_docs_versions"])
@pytest.mark.parametrize("threshold", [0.8, 0.9])
def test_real_corpora_with_exact_truth(name: str, threshold: float) -> None:
    records = records_of(name)
    with gzip.open(CORPORA / f"{name}.pairs.csv.gz", "rt", encoding="utf-8") as opened:
        pairs = {(row["id_a"], row["id_b"]): float(row["jaccard"]) for row in csv.DictReader(opened)}
    documents = [("s", record["id"], record["text"]) for record in records]
    kept, removed = near(documents, NearDedupConfig(threshold=threshold), batch=200)
    resembling = {frozenset(pair) for pair, jaccard in pairs.items() if jaccard >= threshold}
    missed = [pair for pair in resembling if pair <= kept]
    assert 1 - len(missed) / len(resembling) >= 0.995
    for identifier, twin, jaccard in removed:
        truth = pairs.get((identifier, twin), pairs.get((twin, identifier), 0.0))
        assert twin in kept
        assert truth >= threshold
        assert abs(truth - jaccard) < 1e-4
    # The table is rounded to four places; a pair that lies within that of the threshold could go either way.
    if not missed and not any(abs(jaccard - threshold) < 1e-4 for jaccard in pairs.values()):
        assert kept == greedy_oracle(documents, resembling)


@pytest.mark.truth
@pytest.mark.parametrize("name", ["zh_poems", "en_wikitext2"])
def test_real_corpora_where_little_may_be_removed(name: str) -> None:
    texts = {record["id"]: record["text"] for record in records_of(name)[:3000]}
    kept, removed = near([("s", identifier, text) for identifier, text in texts.items()], NearDedupConfig(), batch=500)
    assert len(kept) + len(removed) == len(texts)
    for identifier, twin, jaccard in removed:
        assert jaccard == jaccard_of(shingles_of(texts[identifier]), shingles_of(texts[twin])) >= 0.8
