"""Cleaning: one form for every text, whether it takes the quick way or the slow one."""

import unicodedata

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.clean import clean_batch, clean_text
from data_pipeline.config import CleanConfig
from data_pipeline.document import batch_of, text_buffer

TEXTS = st.lists(
    st.text(alphabet=st.sampled_from("aé\u0301 \t\r\n\f\x00\x1b\x85\u2028\ufeff中Å\U0001f600~"), max_size=12)
)
EVERYTHING = CleanConfig(min_characters=0)


def test_one_form() -> None:
    assert clean_text("a\r\nb\rc\fd\ve\u2028f") == "a\nb\nc\nd\ne\nf"
    assert clean_text("\ufeffcafe\u0301 \x00\x1b[0m\x7f\tend\n") == "café [0m\tend\n"


@settings(deadline=None)
@given(TEXTS)
def test_a_batch_is_cleaned_like_its_texts(texts: list[str]) -> None:
    batch = batch_of([str(number) for number in range(len(texts))], texts)
    cleaned = clean_batch(batch, EVERYTHING)
    expected = [clean_text(text) for text in texts]
    assert cleaned.batch.column("text").to_pylist() == expected
    assert cleaned.batch.column("id").to_pylist() == batch.column("id").to_pylist()
    assert cleaned.changed == sum(text != before for text, before in zip(expected, texts, strict=True))
    for text in expected:
        assert clean_text(text) == text == unicodedata.normalize("NFC", text)


@settings(deadline=None)
@given(TEXTS, st.integers(0, 4), st.integers(4, 8))
def test_length_filters_count_characters_of_the_cleaned_text(texts: list[str], least: int, most: int) -> None:
    ids = [str(number) for number in range(len(texts))]
    cleaned = clean_batch(batch_of(ids, texts), CleanConfig(min_characters=least, max_characters=most))
    kept = {
        identifier: clean_text(text)
        for identifier, text in zip(ids, texts, strict=True)
        if least <= len(clean_text(text)) <= most
    }
    found = zip(cleaned.batch.column("id").to_pylist(), cleaned.batch.column("text").to_pylist(), strict=True)
    assert dict(found) == kept
    assert {identifier for _, identifier, _, _ in cleaned.dropped} == set(ids) - set(kept)
    assert all(reason.startswith("with ") for reason, *_ in cleaned.dropped)


def test_a_slice_of_a_batch_is_cleaned_like_the_whole() -> None:
    texts = [f"line {number}\r" if number % 3 else f"plain {number}" for number in range(30)]
    batch = batch_of([str(number) for number in range(30)], texts)
    cleaned = clean_batch(batch.slice(10, 10), EVERYTHING).batch
    assert cleaned.column("text").to_pylist() == [clean_text(text) for text in texts[10:20]]
    data, borders = text_buffer(cleaned.column("text"))
    assert np.diff(borders).tolist() == [len(clean_text(text)) for text in texts[10:20]]
    assert len(data) >= borders[-1]
