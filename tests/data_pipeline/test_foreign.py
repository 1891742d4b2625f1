"""Megatron's corpora as stores: the same ids, in the same order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data_pipeline.foreign import import_megatron
from data_pipeline.store import Store
from launcher.cli import main
from parallel.common.errors import UserError
from tests.data_pipeline.stores import END, small_tokenizer

DOCUMENTS = [[100, 101, 102], [110], [120, 121], [130, 131, 132, 133]]


def write(prefix: Path, *, ends: bool, dtype: type = np.int32) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor([*document, *([END] if ends else [])]), [len(document) + ends])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_ids_order_and_borders_stay(tmp_path: Path, ends: bool, dtype: type) -> None:
    write(tmp_path / "corpus", ends=ends, dtype=dtype)
    small_tokenizer().save(tmp_path / "tokenizer.json")
    command = ["data", "import", str(tmp_path / "corpus.bin"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main([*command, "--output", str(tmp_path / "store")]) == 0
    store = Store.open(tmp_path / "store")
    store.check()
    (shard,) = store.shards()
    assert store.tokens(shard).tolist() == [token for document in DOCUMENTS for token in [*document, END]]
    assert np.diff(store.document_offsets(shard)).tolist() == [len(document) + 1 for document in DOCUMENTS]
    assert shard.text_bytes == sum(len(small_tokenizer().decode(document).encode()) for document in DOCUMENTS)
    assert store.sources == ("corpus",)
    assert main([*command, "--output", str(tmp_path / "store")]) == 0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "corpus", ends=True)
    arguments = {"tokenizer": small_tokenizer(), "validation_share": 0.0, "shard_tokens": 1000}
    with pytest.raises(UserError, match=r"none\.idx is missing"):
        import_megatron({"none": tmp_path / "none"}, tmp_path / "a", **arguments)
    (tmp_path / "cut.idx").write_bytes((tmp_path / "corpus.idx").read_bytes())
    (tmp_path / "cut.bin").write_bytes((tmp_path / "corpus.bin").read_bytes()[:-8])
    with pytest.raises(UserError, match=r"cut\.bin is cut off"):
        import_megatron({"cut": tmp_path / "cut"}, tmp_path / "b", **arguments)
    builder = IndexedDatasetBuilder(str(tmp_path / "wide.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([50_000]), [1])
    builder.finalize(str(tmp_path / "wide.idx"))
    with pytest.raises(UserError, match="holds the id 50,000"):
        import_megatron({"wide": tmp_path / "wide"}, tmp_path / "c", **arguments)
