"""What an evaluation counts, by the libraries that the field uses (extra `eval`): scikit-learn, sacrebleu, rouge-score.

All are shares or scores as those libraries give them: accuracy, precision, recall and F1 from 0 to 1, BLEU and chrF
from 0 to 100, ROUGE as F-measure from 0 to 1.
"""

import re
from collections.abc import Sequence

from parallel.common.errors import UserError
from parallel.common.lazy import Lazy

_sklearn = Lazy("sklearn")
_sklearn_metrics = Lazy("sklearn.metrics")
_sacrebleu = Lazy("sacrebleu")
_rouge = Lazy("rouge_score")
_rouge_scorer = Lazy("rouge_score.rouge_scorer")

OUTSIDE = "O"
"""The label of a word that belongs to no entity."""
ROUGE = ("rouge1", "rouge2", "rougeL")


def need(library: Lazy, name: str) -> None:
    """Refuses what a library does where it is not installed.

    Raises:
        UserError: it is not.
    """
    if not library.is_installed:
        raise UserError(f"this task needs {name}: pip install 'bloomery[eval]'.")


def classified(truth: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 as the mean over classes (macro) and over all decisions (micro)."""
    need(_sklearn, "scikit-learn")
    accuracy = float(_sklearn_metrics.accuracy_score(truth, found))
    return {"accuracy": accuracy, **_precision_recall(truth, found)}


def _precision_recall(
    truth: Sequence[str], found: Sequence[str], *, labels: Sequence[str] | None = None
) -> dict[str, float]:
    """Of these labels, by default of all."""
    result: dict[str, float] = {}
    for mean in ("macro", "micro"):
        scores = _sklearn_metrics.precision_recall_fscore_support(
            truth, found, labels=labels, average=mean, zero_division=0.0
        )
        named = zip(("precision", "recall", "f1"), scores[:3], strict=True)
        result |= {f"{name}_{mean}": float(score) for name, score in named}
    return result


def tagged(truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """The figures of `classified` over all words of some texts; and of entities, where labels mark them as `B-TYPE`,
    `I-TYPE` and `O`.

    An entity is right if its first word, its last word and its type are, as CoNLL counts (Tjong Kim Sang and De
    Meulder, 2003, arXiv:cs/0306050, section 2.5). An `I-` that goes on with nothing begins one.
    """
    labels = [[label for text in texts for label in text] for texts in (truth, found)]
    figures = classified(*labels)
    if not all(label == OUTSIDE or label[:2] in ("B-", "I-") for label in {*labels[0], *labels[1]}):
        return figures
    known, told = _entities(truth), _entities(found)
    kinds = sorted({*known.values(), *told.values()})
    if not kinds:
        return figures
    places = sorted({*known, *told})
    pair = [[of.get(place, OUTSIDE) for place in places] for of in (known, told)]
    return figures | {f"entity_{name}": value for name, value in _precision_recall(*pair, labels=kinds).items()}


def _entities(texts: Sequence[Sequence[str]]) -> dict[tuple[int, int, int], str]:
    """{(text, first word, end): type}."""
    found: dict[tuple[int, int, int], str] = {}
    for number, labels in enumerate(texts):
        kind, first = "", 0
        for place, label in enumerate([*labels, OUTSIDE]):
            mark, _, name = label.partition("-")
            if kind and (mark != "I" or name != kind):
                found[number, first, place] = kind
                kind = ""
            if mark != OUTSIDE and not kind:
                kind, first = name, place
    return found


class _Words:
    """Words of letters and digits; in writing without spaces each letter is one, which rouge-score would leave out."""

    _WORD = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\u3040-\u30ff]|[^\W\u2e80-\u9fff\uf900-\ufaff\u3040-\u30ff]+")

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in lower case."""
        return self._WORD.findall(text.lower())


def written(truth: Sequence[Sequence[str]], found: Sequence[str], *, tokenize: str = "13a") -> dict[str, float]:
    """BLEU and chrF over the whole corpus, the mean of each ROUGE, and the share that is one of its references.

    Args:
        truth: references of each text, as many for each.
        found: the texts.
        tokenize: sacrebleu's way to find words: 13a, zh, char, intl, none.
    """
    need(_sacrebleu, "sacrebleu")
    need(_rouge, "rouge-score")
    columns = [[each[number] for each in truth] for number in range(len(truth[0]))]
    scorer = _rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=False, tokenizer=_Words())
    rouge = [scorer.score_multi(list(references), text) for references, text in zip(truth, found, strict=True)]
    same = [text.strip() in [each.strip() for each in known] for known, text in zip(truth, found, strict=True)]
    return {
        "bleu": float(_sacrebleu.corpus_bleu(list(found), columns, tokenize=tokenize).score),
        "chrf": float(_sacrebleu.corpus_chrf(list(found), columns).score),
        **{name: sum(each[name].fmeasure for each in rouge) / len(rouge) for name in ROUGE},
        "exact_match": sum(same) / len(same),
    }
