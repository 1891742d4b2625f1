"""Who resembles whom in a corpus, exactly, and what a deduplicator made of that.

    python benchmarks/truth.py CORPUS OUTPUT...

An all-pairs join in words of its own, not the pipeline's: tokens by an expression, shingles by numpy; documents are
compared if they share one of their rarest shingles, so many that a pair at the threshold has to (prefix filtering,
Chaudhuri et al. 2006). 112 MB take a minute and 1.5 GB.
"""

import json
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import xxhash
from numpy.typing import NDArray
from texts import records, tokens_of

THRESHOLD, NGRAM = 0.8, 5
_ROLL = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Documents with equal sets of shingles are one group; pairs are of groups."""

    group: dict[str, int]
    """Of each id."""
    pairs: NDArray[np.int64]
    """[pairs, 2], groups at or above the threshold."""

    @classmethod
    def of(cls, directory: Path) -> "Truth":
        """By brute force, as far as that goes."""
        sets: dict[bytes, int] = {}
        members: list[NDArray[np.uint64]] = []
        group: dict[str, int] = {}
        words: dict[str, int] = {}
        for _, identifier, text in records(directory):
            found = _shingles(text, words)
            key = xxhash.xxh3_128_digest(found.tobytes())
            if key not in sets:
                sets[key] = len(members)
                members.append(found)
            group[identifier] = sets[key]
        lengths = np.array([len(found) for found in members], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        _, numbers, counts = np.unique(np.concatenate(members), return_inverse=True, return_counts=True)
        rarity = np.argsort(np.argsort(counts, kind="stable"))[numbers]
        pieces = np.split(rarity, np.cumsum(lengths)[:-1])
        flat = np.concatenate([np.sort(pieces[number]) for number in order])
        starts = np.concatenate(([0], np.cumsum(lengths[order])))
        return cls(group=group, pairs=order[_join(flat, starts, len(counts), THRESHOLD)])

    def judge(self, kept: set[str]) -> dict[str, float]:
        """Recall: share of the resembling pairs of which not both were kept. False removals: removed documents that
        resemble nothing that was kept."""
        groups = int(max(self.group.values())) + 1
        size, left = np.zeros(groups, dtype=np.int64), np.zeros(groups, dtype=np.int64)
        for identifier, number in self.group.items():
            size[number] += 1
            left[number] += identifier in kept
        first, second = self.pairs.T
        total = (size * (size - 1) // 2).sum() + (size[first] * size[second]).sum()
        missed = (left * (left - 1) // 2).sum() + (left[first] * left[second]).sum()
        stands = left > 0
        near = stands.copy()
        near[first[stands[second]]] = True
        near[second[stands[first]]] = True
        removed = size - left
        return {
            "pairs": int(total),
            "recall": float(1 - missed / max(1, total)),
            "removed": int(removed.sum()),
            "false_removals": int(removed[~near].sum()),
        }


def _shingles(text: str, words: dict[str, int]) -> NDArray[np.uint64]:
    """The set of a text's shingles, hashed; sorted."""
    tokens = tokens_of(text)
    if len(tokens) < NGRAM:
        whole = unicodedata.normalize("NFC", text).lower()
        return np.array([xxhash.xxh3_64_intdigest(whole.encode())], dtype=np.uint64)
    ids = np.array([words.setdefault(token, len(words)) for token in tokens], dtype=np.uint64)
    hashes = np.zeros(len(ids) - NGRAM + 1, dtype=np.uint64)
    for place in range(NGRAM):
        hashes = (hashes ^ (hashes >> np.uint64(29))) * _ROLL + ids[place : place + len(hashes)] + np.uint64(1)
    return np.unique(hashes)


@numba.njit
def _join(flat, starts, shingles, threshold):
    """Pairs of documents, which come by size, at or above the threshold; [pairs, 2]."""
    last = np.full(shingles, -1, np.int64)  # of each shingle: the newest posting
    document, before = [np.int64(0)], [np.int64(-1)]
    compared = np.full(len(starts) - 1, -1, np.int64)
    found = [(np.int64(0), np.int64(0))]
    for mine in range(len(starts) - 1):
        own = flat[starts[mine] : starts[mine + 1]]
        prefix = len(own) - int(np.ceil(threshold * len(own) - 1e-9)) + 1
        for shingle in own[:prefix]:
            posting = last[shingle]
            while posting >= 0:
                other = document[posting]
                posting = before[posting]
                theirs = flat[starts[other] : starts[other + 1]]
                if len(theirs) < threshold * len(own) - 1e-9:
                    break  # older postings are of smaller documents
                if compared[other] == mine:
                    continue
                compared[other] = mine
                shared, i, j = 0, 0, 0
                while i < len(own) and j < len(theirs):
                    if own[i] == theirs[j]:
                        shared, i, j = shared + 1, i + 1, j + 1
                    elif own[i] < theirs[j]:
                        i += 1
                    else:
                        j += 1
                if shared >= threshold * (len(own) + len(theirs) - shared) - 1e-9:
                    found.append((np.int64(other), np.int64(mine)))
            document.append(np.int64(mine))
            before.append(last[shingle])
            last[shingle] = len(document) - 1
    pairs = np.empty((len(found) - 1, 2), np.int64)
    for place in range(1, len(found)):
        pairs[place - 1, 0], pairs[place - 1, 1] = found[place]
    return pairs


if __name__ == "__main__":
    truth = Truth.of(Path(sys.argv[1]))
    kept = {output: {name for _, name, _ in records(Path(output))} for output in sys.argv[2:]}
    print(json.dumps({output: truth.judge(names) for output, names in kept.items()}))
