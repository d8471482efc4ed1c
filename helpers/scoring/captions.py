"""BLEU-4 and CIDEr of captions, as the COCO caption evaluation computes them.

Both are written out here: the published packages bring 100 MB of jar files (pycocoevalcap, of 2020) or torchmetrics
(aac-metrics), for two sums over n-grams.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

N = 4  # n-grams of one to four words
SIGMA = 6.0  # by which CIDEr-D forgives a difference in length
TINY, SMALL = 1e-15, 1e-9  # the official smoothing: no n-gram in common gives nearly 0, not an error

_BETWEEN = re.compile(r"(?<!\d)[,:]|[,:](?!\d)|[;!?()\[\]{}<>\"“”„«»`…]|\.{2,}|--+|[–—]")
_CLITIC = re.compile(r"(?:n't|'(?:s|m|d|re|ve|ll))(?!\w)")


def words(caption: str) -> list[str]:
    """The words of a caption as they are compared: lower case, without punctuation, clitics apart ("does n't").

    Stands for the Penn Treebank tokeniser of the official evaluation, a Java program, after which punctuation is
    dropped. It splits all but 1 of 12,658 captions of MSR-VTT and TGIF alike; unlike there, the dot of an abbreviation
    ("mr.") goes, "75%" and "$5" are one word, and brackets are no words.
    """
    text = _CLITIC.sub(r" \g<0> ", _BETWEEN.sub(" ", caption.lower().replace("’", "'")))
    return [*filter(None, (word if _CLITIC.fullmatch(word) else word.strip(".-'") for word in text.split()))]


def caption_scores(written: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """BLEU-4 (0 to 1) and CIDEr (0 to 10) of one written caption a GIF against all captions that people gave it.

    The keys are ids of GIFs, the same in both. Returns "BLEU-4", "CIDEr" and the number of "captions".
    CIDEr weighs an n-gram by how few of these GIFs have it in a reference, so that numbers on other GIFs, or on fewer,
    do not compare; of a single GIF it is 0. Raises ValueError if there is no caption, a GIF is in one of the two only,
    or a GIF has no reference.
    """
    if not written:
        raise ValueError("There is no caption to score.")
    if unlike := sorted(set(written) ^ set(references)):
        lacks = "no written caption" if unlike[0] in references else "no reference"
        raise ValueError(
            f"{len(unlike):,} GIFs are written about or have references, not both: {unlike[0]} has {lacks}."
        )
    if bare := [gif for gif, texts in references.items() if isinstance(texts, str) or not len(texts)]:
        raise ValueError(f"{len(bare):,} GIFs have no list of references, the first is {bare[0]}.")
    gifs = sorted(written)
    hypotheses = [words(written[gif]) for gif in gifs]
    targets = [[words(text) for text in references[gif]] for gif in gifs]
    return {"BLEU-4": _bleu(hypotheses, targets), "CIDEr": _cider(hypotheses, targets), "captions": len(gifs)}


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def _bleu(hypotheses: list[list[str]], targets: list[list[list[str]]]) -> float:
    """Corpus BLEU-4 of Papineni et al. (ACL 2002): BP * (p_1 p_2 p_3 p_4)^(1/4).

    p_n: n-grams of all captions that a reference has (each at most as often as the reference that has it most), over
    all of them. BP = min(1, exp(1 - r / c)), c being the words written and r those of the references nearest in
    length (of two equally near ones the shorter).
    """
    product = 1.0
    for n in range(1, N + 1):
        right = total = 0
        for tokens, references in zip(hypotheses, targets, strict=True):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in references:
                most |= _ngrams(reference, n)
            right += (_ngrams(tokens, n) & most).total()
            total += max(len(tokens) - n + 1, 0)
        product *= (right + TINY) / (total + SMALL)
    length = sum(map(len, hypotheses))
    nearest = sum(
        min((abs(len(reference) - len(tokens)), len(reference)) for reference in references)[1]
        for tokens, references in zip(hypotheses, targets, strict=True)
    )
    penalty = min(1.0, math.exp(1 - (nearest + SMALL) / (length + TINY)))
    return product ** (1 / N) * penalty


def _cider(hypotheses: list[list[str]], targets: list[list[list[str]]]) -> float:
    """CIDEr-D of Vedantam et al. (CVPR 2015), which the COCO evaluation calls CIDEr.

    The n-grams of a text are weighed by count * log(GIFs / GIFs with the n-gram in a reference): vectors h and r.
    A caption's score is the mean over its references and over n of
        10 * sum(min(h, r) * r) / (|h| |r|) * exp(-(difference in length)^2 / (2 * 6^2)).
    """
    total = 0.0
    for n in range(1, N + 1):
        counted = [[_ngrams(reference, n) for reference in references] for references in targets]
        having = Counter(ngram for grams in counted for ngram in set().union(*grams))

        def vector(grams: Counter[tuple[str, ...]], having=having) -> tuple[dict[tuple[str, ...], float], float]:
            weights = {g: count * math.log(len(hypotheses) / max(having[g], 1)) for g, count in grams.items()}
            return weights, math.sqrt(sum(weight**2 for weight in weights.values()))

        for tokens, references, grams in zip(hypotheses, targets, counted, strict=True):
            ours, our_norm = vector(_ngrams(tokens, n))
            score = 0.0
            for reference, theirs in zip(references, map(vector, grams), strict=True):
                weights, norm = theirs
                common = sum(min(ours[g], weights[g]) * weights[g] for g in ours.keys() & weights.keys())
                apart = len(tokens) - len(reference)
                if common:
                    score += common / (our_norm * norm) * math.exp(-(apart**2) / (2 * SIGMA**2))
            total += score / len(references)
    return 10 * total / N / len(hypotheses)
