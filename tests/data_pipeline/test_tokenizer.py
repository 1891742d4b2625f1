import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, pre_tokenizers

from data_pipeline.tokenizer import END_OF_DOCUMENT, PADDING, RESERVED, SPECIAL_TOKENS, Tokenizer, train
from parallel.common.errors import UserError
from parallel.common.files import hash_file
from tests.data_pipeline.stores import small_tokenizer

CHINESE = "白日依山尽黄河入海流欲穷千里目更上一层楼"
TEXTS = [
    "The quick brown fox jumps over the lazy dog, don't you think? " * 3,
    "def main(arguments):\n    return [x ** 2 for x in range(1000)]\n",
    CHINESE * 4 + "。人工智能语言模型的训练数据需要清洗。" * 5,
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。ภาษาไทยไม่มีช่องว่าง",
]

TRAIN_PROGRAM = """
import json, sys
from pathlib import Path
from data_pipeline.tokenizer import train
train(iter(json.loads(sys.argv[1])), 512, Path(sys.argv[2]))
"""


@given(st.text())
def test_every_text_round_trips(text: str) -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


@pytest.mark.parametrize("text", [*TEXTS, "", "\r\n\t \u3000\ufeff\u200b", " 'S 12345678 e\u0301", "\x00\x01\x7f"])
def test_awkward_texts_round_trip(tmp_path: Path, text: str) -> None:
    tokenizer = train(iter(TEXTS), 512, tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_special_tokens_come_first_and_in_text_are_only_text() -> None:
    tokenizer = small_tokenizer()
    assert (tokenizer.end_of_document, tokenizer.padding) == (0, 1)
    assert [tokenizer.decode([index]) for index in range(66)] == list(SPECIAL_TOKENS)
    text = f"a {END_OF_DOCUMENT} b {PADDING} c {RESERVED[7]}"
    (ids,) = tokenizer.encode_batch([text])
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == text


def test_loading_gives_the_same_tokenizer(tmp_path: Path) -> None:
    trained = train(iter(TEXTS), 512, tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_batch(TEXTS) == trained.encode_batch(TEXTS)
    assert loaded.vocabulary_size == trained.vocabulary_size
    assert loaded.fingerprint == trained.fingerprint == hash_file(tmp_path / "tokenizer.json")


def test_what_stands_around_a_text_is_kept_in_the_file_and_in_no_ids(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.around == ([], [])
    tokenizer.save_around(tmp_path / "tokenizer.json", [2, 0], [3])
    found = Tokenizer.load(tmp_path)
    assert found.around == ([2, 0], [3])
    assert found.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    theirs = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    one, other = tokenizer.encode_batch(["iron", "ore"])
    pair = theirs.encode("iron", "ore")
    assert pair.ids == [2, 0, *one, 3, *other, 3]
    assert pair.type_ids == [0] * (len(one) + 3) + [1] * (len(other) + 1)


def test_training_is_deterministic(tmp_path: Path) -> None:
    files = []
    for threads in ("1", "2"):
        file = tmp_path / f"{threads}.json"
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-c", TRAIN_PROGRAM, json.dumps(TEXTS), str(file)]
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
        files.append(file.read_bytes())
    assert files[0] == files[1]
    assert train(iter(TEXTS), 512, tmp_path / "here.json").to_json().encode() == files[0]


def test_unspaced_writing_is_cut_for_training_and_whole_for_encoding(tmp_path: Path) -> None:
    tokenizer = train(iter([CHINESE] * 50), 512, tmp_path / "tokenizer.json")
    pieces = [tokenizer.decode([index]) for index in range(len(SPECIAL_TOKENS), tokenizer.vocabulary_size)]
    assert max(len(piece) for piece in pieces if piece and piece[0] in CHINESE) == 4
    # Cut from its second character on, every piece but the last still fits: encoding does not cut at fours.
    (ids,) = tokenizer.encode_batch([CHINESE[4:8] + "x" + "的" + CHINESE[4:8]])
    assert tokenizer.decode([ids[-1]]) == CHINESE[4:8]


def test_a_small_sample_yields_a_smaller_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train(iter(["ab ab"]), 8192, tmp_path / "tokenizer.json")
    assert tokenizer.vocabulary_size == 384
    assert "not 8192" in caplog.text


@pytest.mark.parametrize("size", [0, 128, 256, 500])
def test_an_impossible_size_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(UserError, match=f"vocabulary_size is {size}: expected a multiple of 128, 384 or more"):
        train(iter(TEXTS), size, tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


def foreign_tokenizer(path: Path, *special: str) -> dict[str, int]:
    """Writes a word-level tokenizer of another maker, one that truncates, and returns its vocabulary."""
    vocabulary = {token: index for index, token in enumerate([*special, "<unk>", "hello", "world"])}
    backend = HuggingFaceTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(path))
    return vocabulary


def test_a_foreign_tokenizer_keeps_its_ids_and_gets_what_it_lacks(tmp_path: Path) -> None:
    vocabulary = foreign_tokenizer(tmp_path / "tokenizer.json", "<s>", "</s>")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.encode_batch(["hello world hello"]) == [[3 + i for i in (0, 1, 0)]]
    assert tokenizer.end_of_document == vocabulary["</s>"]
    assert tokenizer.padding == len(vocabulary)
    assert tokenizer.vocabulary_size == 128
    tokenizer.save(tmp_path / "saved.json")
    saved = Tokenizer.load(tmp_path / "saved.json")
    assert (saved.end_of_document, saved.padding) == (tokenizer.end_of_document, tokenizer.padding)
    assert saved.fingerprint == tokenizer.fingerprint
    added = {int(index) for index in range(len(vocabulary), len(vocabulary) + 65)}
    assert {saved.decode([index]) for index in added} == {PADDING, *RESERVED}


def test_an_end_of_document_may_be_named_or_is_added(tmp_path: Path) -> None:
    vocabulary = foreign_tokenizer(tmp_path / "tokenizer.json", "[SEP]")
    named = Tokenizer.load(tmp_path, end_of_document="[SEP]")
    assert named.end_of_document == vocabulary["[SEP]"]
    assert Tokenizer.load(tmp_path).decode([len(vocabulary)]) == END_OF_DOCUMENT
    with pytest.raises(UserError, match="no token '<stop>'"):
        Tokenizer.load(tmp_path, end_of_document="<stop>")


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer at .*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
