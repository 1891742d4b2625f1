"""Span corruption: spans are cut out of documents, and a decoder tells them, each behind the mark that stands for it.

    document   the furnace was lit before the ore came EOD
    encoder    the furnace S0 before the S1 EOD
    decoder    PAD S0 was lit S1 ore came             (PAD begins a document)
    labels     S0 was lit S1 ore came EOD

As in Raffel et al., 2019, arXiv:1910.10683, section 3.1.4: 15 % of the tokens in spans of 3 on average, of random
lengths at random places, the first never at the beginning. Each document of a row is corrupted by itself, and its
decoder sees that document alone. What is cut is drawn from (seed, sample, document in the row).

A row takes so many tokens that one document fills the encoder exactly; several documents round differently, and what
then does not fit is left out at the end of the row. A document with more spans than the tokenizer has marks has fewer,
longer ones. The end of a document is never cut out.
"""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Rows
from data_pipeline.marks import marks
from data_pipeline.masking import shares
from data_pipeline.sample_builder import SampleBuilder, Setting


class Spans(SampleBuilder):
    """Rows of documents without some spans, and the spans."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._marks = marks(setting.store).sentinels
        self.length = setting.spans.source_length(setting.sequence_length)
        self._targets = setting.spans.target_length(setting.sequence_length)

    def batch(self, rows: Rows) -> dict[str, Tensor]:
        padding, count = self._setting.store.padding, len(rows.ids)
        lengths = {"encoder_tokens": self._setting.sequence_length, "tokens": self._targets, "labels": self._targets}
        tokens = {name: np.full((count, length), padding, dtype=np.int64) for name, length in lengths.items()}
        weights = np.zeros((count, self._targets), dtype=np.float32)
        places = np.tile(np.arange(self._targets), (count, 1))
        of_encoder = np.zeros((count, self._setting.sequence_length), dtype=np.int32)
        of_decoder = np.zeros((count, self._targets), dtype=np.int32)
        for row in np.flatnonzero(rows.sample_ids >= 0).tolist():
            text = rows.ids[row, 1 : 1 + rows.labels_in_row[row]].astype(np.int64)
            read, told, first, second = self._row(text, int(rows.sample_ids[row]))
            tokens["encoder_tokens"][row, : len(read)] = read
            tokens["labels"][row, : len(told)] = told
            begins = np.diff(second, prepend=-1) != 0
            tokens["tokens"][row, 1 : len(told)] = told[:-1]
            tokens["tokens"][row, np.flatnonzero(begins)] = padding
            weights[row, : len(told)] = 1
            filled = len(read) < lengths["encoder_tokens"]
            beyond = int(first[-1]) + 1 if filled else int(second[-1]) if len(second) else 0
            of_encoder[row], of_decoder[row] = beyond, beyond
            of_encoder[row, : len(first)], of_decoder[row, : len(second)] = first, second
            firsts = np.flatnonzero(np.diff(of_decoder[row], prepend=-1) != 0)
            places[row] -= np.repeat(firsts, np.diff(firsts, append=self._targets))
        arrays = {
            **tokens,
            "loss_weights": weights,
            "positions": places,
            "document_ids": of_decoder,
            "encoder_document_ids": of_encoder,
            "sample_ids": rows.sample_ids,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _row(
        self, tokens: NDArray[np.int64], sample: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """What the encoder reads, what the decoder tells, and the document of each of both."""
        end, setting = self._setting.store.end_of_document, self._setting
        borders = [0, len(tokens)]
        if setting.mask_documents:
            borders = [0, *(np.flatnonzero(tokens[:-1] == end) + 1).tolist(), len(tokens)]
        read, told = [], []
        for number, (start, stop) in enumerate(pairwise(borders)):
            document = tokens[start:stop]
            ended = bool(document[-1] == end)
            left, spans = self._corrupted(document[:-1] if ended else document, sample, number)
            read.append(np.concatenate([left, document[-1:]]) if ended else left)
            told.append(np.append(spans, end) if len(spans) else spans)
        found = []
        for parts, most in ((read, setting.sequence_length), (told, self._targets)):
            numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            found.append((np.concatenate(parts)[:most], numbers[:most]))
        (encoder, first), (decoder, second) = found
        told_of = np.isin(second, first)  # a document that was left out of the encoder's row is not told
        return encoder, decoder[told_of], first, second[told_of]

    def _corrupted(
        self, document: NDArray[np.int64], sample: int, number: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A document with marks in place of spans, and the spans, each behind its mark."""
        count = len(document)
        noise, spans = self._setting.spans.cut(count)
        spans = min(spans, len(self._marks))
        if not spans:
            return document, document[:0]
        draws = shares(2 * count, "spans", self._setting.seed, sample, number).reshape(2, -1)
        kept, gone = _parts(count - noise, spans, draws[0]), _parts(noise, spans, draws[1])
        lengths = np.stack((kept, gone), axis=1).ravel()
        stretches = np.split(document, np.cumsum(lengths)[:-1])
        marked = self._marks[:spans, None]
        left = [part for kept_part, mark in zip(stretches[::2], marked, strict=True) for part in (kept_part, mark)]
        cut = [part for mark, span in zip(marked, stretches[1::2], strict=True) for part in (mark, span)]
        return np.concatenate(left), np.concatenate(cut)


def _parts(total: int, count: int, draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """`total` as a sum of `count` numbers of 1 or more, each such sum as likely as any other."""
    cuts = np.sort(np.argsort(draws[: total - 1], kind="stable")[: count - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)
