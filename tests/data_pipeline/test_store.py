import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_pipeline.indexed import dtype_for, index_parts, read_ids, read_index
from data_pipeline.store import Store, StoreWriter, TokenizedDocument
from parallel.common.errors import UserError
from tests.data_pipeline.stores import END, distinct_documents, make_store, small_tokenizer, tokenized

ROOT = Path(__file__).parents[2]
DOCUMENTS = {"prose": distinct_documents([5, 1, 0, 7, 3]), "code": distinct_documents([4, 4], 500)}

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from data_pipeline.store import StoreWriter
from data_pipeline.tokenizer import Tokenizer
from tests.data_pipeline.stores import tokenized

path, place = Path(sys.argv[1]), sys.argv[2]
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)

def documents():
    for number, document in enumerate(tokenized([[100 + n] * n for n in range(20)], "a")):
        if place == "in the middle" and number == 13:
            kill()
        yield document

class Killed(StoreWriter):
    def _append(self, record):
        if len(self.shards) == 2 and place == "before the manifest":
            kill()
        if len(self.shards) == 2 and place == "within the line":
            with (self.path / "manifest.jsonl").open("a") as file:
                file.write('{"kind": "shard", "ind')
            kill()
        super()._append(record)

writer = Killed(path, tokenizer=Tokenizer.load(path), configuration="c")
left = documents()
while writer.add_shard("a", "training", left, max_tokens=40):
    pass
writer.finish()
"""


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def edit_manifest(path: Path, old: str, new: str) -> None:
    file = path / "manifest.jsonl"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", DOCUMENTS, {"prose": [[9, 9]]}, shard_tokens=8)


def test_what_is_written_is_read(store: Store) -> None:
    assert store.sources == ("prose", "code")
    assert [(shard.source, shard.split) for shard in store.shards()] == [
        *[("prose", "training")] * 3,
        ("code", "training"),
        ("prose", "validation"),
    ]
    read = []
    for shard in store.shards(split="training", source="prose"):
        offsets = store.document_offsets(shard)
        read += [store.tokens(shard)[start:stop].tolist() for start, stop in pairwise(offsets)]
    assert read == [[*document, END] for document in DOCUMENTS["prose"]]
    store.check()


def test_the_document_table_says_where_each_document_lies(store: Store) -> None:
    shard = store.shards(source="code")[0]
    table = pq.read_table(store.path / "shard-00003.docs.parquet").to_pydict()
    assert table == {
        "id": ["code-0", "code-1"],
        "source": ["code", "code"],
        "offset": [0, 5],
        "length": [5, 5],
        "text_bytes": [12, 12],
    }
    assert (shard.documents, shard.tokens, shard.text_bytes) == (2, 10, 24)


def test_the_manifest_names_everything_and_no_time_or_place(store: Store) -> None:
    records = [json.loads(line) for line in (store.path / "manifest.jsonl").read_text().splitlines()]
    header, *shards, end = records
    assert header["format"] == 1
    assert header["dtype"] == "uint16"
    assert header["tokenizer"] == {
        "vocabulary_size": store.vocabulary_size,
        "end_of_document": 0,
        "padding": 1,
        "fingerprint": small_tokenizer().fingerprint,
    }
    assert {key: end[key] for key in ("shards", "documents", "tokens", "text_bytes")} == {
        "shards": 5,
        "documents": 8,
        "tokens": sum(shard["tokens"] for shard in shards),
        "text_bytes": sum(shard["text_bytes"] for shard in shards),
    }
    assert str(store.path) not in (store.path / "manifest.jsonl").read_text()


def test_token_counts(tmp_path: Path) -> None:
    store = make_store(tmp_path, {"web": [[70, 70, 71], [300]], "code": [[70]]}, {"web": [[99]]}, shard_tokens=1)
    for source, expected in ((None, {END: 3, 70: 3, 71: 1, 300: 1}), ("code", {END: 1, 70: 1})):
        counts = store.token_counts(split="training", source=source)
        assert counts.shape == (store.vocabulary_size,)
        assert {int(token): int(counts[token]) for token in np.flatnonzero(counts)} == expected


@pytest.mark.truth
def test_megatron_reads_our_shards(store: Store) -> None:
    for shard in store.shards():
        theirs = IndexedDataset(str(store.path / shard.stem))
        offsets = store.document_offsets(shard)
        assert len(theirs) == shard.documents
        assert theirs.document_indices.tolist() == list(range(shard.documents + 1))
        for number in range(shard.documents):
            ours = store.tokens(shard)[offsets[number] : offsets[number + 1]]
            assert theirs[number].dtype == np.uint16
            np.testing.assert_array_equal(theirs[number], ours)


@pytest.mark.truth
def test_megatron_reads_large_vocabularies(tmp_path: Path) -> None:
    dtype = dtype_for(65_664)
    assert dtype == np.uint32
    ids = np.array([65_600, 3, 0, 70_000, 0], dtype=dtype)
    (tmp_path / "x.bin").write_bytes(ids.tobytes())
    (tmp_path / "x.idx").write_bytes(b"".join(index_parts(np.array([3, 2], dtype=np.int32), dtype)))
    theirs = IndexedDataset(str(tmp_path / "x"))
    assert [theirs[index].tolist() for index in range(2)] == [[65_600, 3, 0], [70_000, 0]]


@pytest.mark.truth
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    builder.add_document(torch.tensor([5, 6, 7, 8, 0]), [3, 2])
    builder.add_document(torch.tensor([9, 0]), [2])
    builder.finalize(str(tmp_path / "x.idx"))
    index = read_index(tmp_path / "x.idx")
    assert index.dtype == dtype
    assert index.lengths.tolist() == [3, 2, 2]
    assert (index.byte_offsets // index.dtype.itemsize).tolist() == [0, 3, 5]
    assert index.document_borders.tolist() == [0, 2, 3]
    assert read_ids(tmp_path / "x.bin", index.dtype).tolist() == [5, 6, 7, 8, 0, 9, 0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"MMIDIDX", "cut off after 7 bytes"),
        (b"x" * 100, "not a Megatron index of version 1"),
        (b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08" + (9).to_bytes(8, "little") * 2, "9 sequences"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "x.idx").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.idx .*{sentence}"):
        read_index(tmp_path / "x.idx")


@pytest.mark.parametrize("place", ["in the middle", "before the manifest", "within the line"])
def test_a_killed_writer_goes_on_to_the_same_bytes(tmp_path: Path, place: str) -> None:
    documents = [[100 + n] * n for n in range(20)]
    stores = []
    for name, killed in (("killed", place), ("whole", "")):
        path = tmp_path / name
        path.mkdir()
        small_tokenizer().save(path / "tokenizer.json")
        done = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path), killed], cwd=ROOT, check=False)
        assert done.returncode == (-9 if killed else 0)
        stores.append(path)
    path = stores[0]
    with pytest.raises(UserError, match="not finished: run `bloomery data build` again"):
        Store.open(path)
    writer = StoreWriter(path, tokenizer=small_tokenizer(), configuration="c")
    sealed = {name for shard in writer.shards for name in shard.files}
    assert {file.name for file in path.iterdir()} == sealed | {"manifest.jsonl", "tokenizer.json"}
    assert len(writer.shards) == 2
    left = list(tokenized(documents, "a"))[writer.documents_written("a", "training") :]
    remaining = iter(left)
    while writer.add_shard("a", "training", remaining, max_tokens=40):
        pass
    writer.finish().check()
    assert contents(path) == contents(stores[1])


def test_a_torn_last_line_is_cut_off(store: Store) -> None:
    manifest = store.path / "manifest.jsonl"
    before = contents(store.path)
    *lines, end = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines) + end[:-9])
    with pytest.raises(UserError, match="not finished"):
        Store.open(store.path)
    StoreWriter(store.path, tokenizer=small_tokenizer(), configuration="test").finish()
    assert contents(store.path) == before


def test_a_header_that_was_torn_is_begun_again(tmp_path: Path) -> None:
    make_store(tmp_path / "whole", DOCUMENTS)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "manifest.jsonl").write_text('{"kind": "hea')
    with pytest.raises(UserError, match="no token store"):
        Store.open(torn)
    make_store(torn, DOCUMENTS)
    assert contents(torn) == contents(tmp_path / "whole")


def test_a_finished_store_stays_as_it_is(store: Store) -> None:
    before = contents(store.path)
    writer = StoreWriter(store.path, tokenizer=small_tokenizer(), configuration="test")
    assert writer.finished
    assert writer.documents_written("prose", "training") == 5
    writer.finish()
    assert contents(store.path) == before


def test_a_source_without_documents_leaves_nothing(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, tokenizer=small_tokenizer(), configuration="c")
    assert writer.add_shard("empty", "training", iter([])) is None
    assert sorted(contents(tmp_path)) == ["manifest.jsonl", "tokenizer.json"]


def test_another_configuration_or_tokenizer_is_refused(store: Store) -> None:
    before = contents(store.path)
    with pytest.raises(UserError, match=r"begun with another configuration: give another data\.store"):
        StoreWriter(store.path, tokenizer=small_tokenizer(), configuration="other")
    with pytest.raises(UserError, match="begun with another tokenizer"):
        StoreWriter(store.path, tokenizer=small_tokenizer(512), configuration="test")
    assert contents(store.path) == before


def test_a_full_disk_is_said_plainly_and_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, tokenizer=small_tokenizer(), configuration="c")
    writer.add_shard("a", "training", tokenized(DOCUMENTS["prose"], "a"))

    def full_disk() -> Iterator[TokenizedDocument]:
        yield from tokenized(DOCUMENTS["code"], "a")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="no space left for the token store"):
        writer.add_shard("a", "training", full_disk())
    writer = StoreWriter(tmp_path, tokenizer=small_tokenizer(), configuration="c")
    assert len(writer.shards) == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_missing_store_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no token store at .*: make it with `bloomery data build`"):
        Store.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"documents": 2', '"documents": 3', "line 2 does not match its checksum"),
        ('"kind": "shard"', '"kind": shard', "not JSON"),
        ('{"kind": "shard"', '5\n{"kind": "shard"', "line 2 does not match"),
    ],
)
def test_a_changed_manifest_is_refused(store: Store, old: str, new: str, sentence: str) -> None:
    edit_manifest(store.path, old, new)
    for opened in (Store.open, lambda path: StoreWriter(path, tokenizer=small_tokenizer(), configuration="test")):
        with pytest.raises(UserError, match=rf"manifest\.jsonl is damaged: .*{sentence}"):
            opened(store.path)


def test_a_missing_line_is_noticed(store: Store) -> None:
    manifest = store.path / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    for left, sentence in ((lines[:2] + lines[3:], "not numbered in order"), (lines[:5] + lines[6:], "totals")):
        manifest.write_text("".join(left))
        with pytest.raises(UserError, match=sentence):
            Store.open(store.path)


def test_damaged_files_are_named(store: Store) -> None:
    file = store.path / "shard-00001.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + b"\x01\x01")
    with pytest.raises(UserError, match=r"shard-00001\.bin is damaged: its content changed"):
        Store.open(store.path).check()
    file.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"shard-00001\.bin has \d+ bytes instead of \d+: the store is damaged"):
        Store.open(store.path)
    file.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.bin is missing"):
        Store.open(store.path)


def test_an_index_of_another_shard_is_noticed(store: Store) -> None:
    shutil.copy(store.path / "shard-00003.idx", store.path / "shard-00004.idx")
    with pytest.raises(UserError, match=r"shard-00004\.idx is damaged"):
        store.document_offsets(store.shards()[4])


def test_a_changed_tokenizer_is_noticed(store: Store) -> None:
    small_tokenizer(512).save(store.tokenizer)
    with pytest.raises(UserError, match=r"tokenizer\.json is missing or not the one"):
        Store.open(store.path)
