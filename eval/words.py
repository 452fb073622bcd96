"""Scores answers in words: yes or no, one of two names, a description. No model, no pictures.

Every rule is a function of one answer, or, for CIDEr, of all of them; texts are compared in lower case.
"""

import math
import re
from collections import Counter
from typing import Any

import numpy as np

from eval.predictions import Prediction, Target


def said_yes(raw: str) -> bool:
    """POPE's own rule: up to the first full stop, without commas, `no` or `not` as a word says no, all else says yes."""
    words = raw.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def yes_no_report(targets: list[Target], predictions: list[Prediction]) -> dict[str, Any]:
    """Precision, recall and F1 of `yes`, the share of yes, and how many answers hold neither word."""
    truth = np.array([target.answers[0] == "yes" for target in targets])
    said = np.array([said_yes(prediction.raw) for prediction in predictions])
    hits = int((truth & said).sum())
    precision, recall = hits / max(1, said.sum()), hits / max(1, truth.sum())
    neither = sum(re.search(r"\b(yes|no|not)\b", prediction.raw.lower()) is None for prediction in predictions)
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(2 * precision * recall / (precision + recall)) if hits else 0.0,
        "yes_ratio": float(said.mean()),
        "neither_yes_nor_no": neither,
    }


def names_of(word: str) -> list[str]:
    """A category's name as spoken; `bow_(weapon)` is called `bow` and `weapon`, as Ferret's script takes it apart."""
    return [part.replace("_", " ").strip().lower() for part in re.split(r"[()]", word) if part.strip(" _")]


def chosen(raw: str, right: list[str], wrong: list[str]) -> bool | None:
    """Whether the right one of two things was named, as whole words or with a plural s; None where both or neither were.

    What follows `not` or `no` as a word, up to a comma, a full stop or `but`, does not count as named. Of names within one
    another the longer one counts: a "hot dog" is no "dog".
    """
    text = re.sub(r"(?<!\w)(?:not|no)(?!\w).*?(?=[,.;]|(?<!\w)but(?!\w)|$)", " ", raw.lower())
    named = set()
    for name, is_right in sorted([(n, True) for n in right] + [(n, False) for n in wrong], key=lambda pair: -len(pair[0])):
        text, count = re.subn(rf"(?<!\w){re.escape(name)}(s|es)?(?!\w)", "/", text)
        named |= {is_right} if count else set()
    return named.pop() if len(named) == 1 else None


def ferrets_choice(raw: str, name: str, synonyms: list[str]) -> bool:
    """Ferret's rule (apple/ml-ferret, ferret/eval/eval_lvis.py), for comparison with numbers from it.

    A name counts inside another word (`car` in `cart`), the wrong name is not looked for, and words that begin with `no`
    are deleted up to the next comma or full stop.
    """
    text = re.sub(r"\s+not[^,.]*[,.]", "", raw)
    text = re.sub(r"\s+no[^,.]*[,.]", "", text)
    spoken = [name.replace("_", " ").strip()]
    for synonym in synonyms:
        parts = synonym.split("(") if "(" in synonym else [synonym]
        spoken += [part.replace("_", " ").replace(")", "").strip() for part in parts]
    return any(name in text for name in spoken)


def choice_hits(targets: list[Target], predictions: list[Prediction]) -> dict[str, np.ndarray]:
    """(N,) 0 or 1 by our rule and by Ferret's; where likelihoods were compared, by these alone (a half where they are equal).

    answers of a target: the right name and its synonyms; choices: the two names in the order asked
    """
    ours, ferret = [], []
    for target, prediction in zip(targets, predictions, strict=True):
        right = target.choices.index(target.answers[0])
        if prediction.likelihoods:
            gap = prediction.likelihoods[right] - prediction.likelihoods[1 - right]
            ours.append(0.5 + 0.5 * np.sign(gap))
            continue
        names = [spoken for name in target.answers for spoken in names_of(name)]
        ours.append(float(chosen(prediction.raw, names, names_of(target.choices[1 - right])) is True))
        ferret.append(float(ferrets_choice(prediction.raw, target.answers[0], list(target.answers[1:]))))
    hits = {"two_choice": np.array(ours)}
    return hits | ({"ferret_rule": np.array(ferret)} if ferret else {})


def choice_report(targets: list[Target], predictions: list[Prediction], hits_N: np.ndarray) -> dict[str, Any]:
    """What the order of the two names does, and how many answers name both or neither."""
    first = np.array([target.choices.index(target.answers[0]) == 0 for target in targets])
    by_object: dict[str, list[float]] = {}
    for target, hit in zip(targets, hits_N, strict=True):
        by_object.setdefault(target.id.rpartition("-")[0], []).append(hit)
    pairs = [values for values in by_object.values() if len(values) == 2]
    report = {
        "right_name_first": float(hits_N[first].mean()) if first.any() else None,
        "right_name_second": float(hits_N[~first].mean()) if (~first).any() else None,
        "right_in_both_orders": float(np.mean([min(pair) == 1 for pair in pairs])) if pairs else None,
    }
    if not predictions[0].likelihoods:
        undecided = 0
        for target, prediction in zip(targets, predictions, strict=True):
            wrong = target.choices[1 - target.choices.index(target.answers[0])]
            names = [spoken for name in target.answers for spoken in names_of(name)]
            undecided += chosen(prediction.raw, names, names_of(wrong)) is None
        report["both_or_neither_named"] = undecided
    return report


def tokens_of(text: str) -> list[str]:
    """Lower-case words without punctuation: near coco-caption's tokenizer, which needs Java."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def _ngrams(words: list[str]) -> list[Counter]:
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in (1, 2, 3, 4)]


def cider(answers: list[str], references: list[list[str]], sigma: float = 6.0) -> np.ndarray:
    """CIDEr-D (arXiv 1411.5726) of each answer, (N,) float64, as coco-caption computes it but for its tokenizer.

    references: at least one per answer; document frequencies are those of all references. A perfect answer scores up to 10.
    """
    cooked = [[_ngrams(tokens_of(text)) for text in texts] for texts in references]
    frequency: Counter = Counter()
    for texts in cooked:
        frequency.update({gram for counts in texts for of_length in counts for gram in of_length})
    log_documents = math.log(len(references)) if len(references) > 1 else 1.0

    def vectors(counts: list[Counter]) -> tuple[list[dict], list[float], int]:
        weighted = [
            {g: c * (log_documents - math.log(max(1, frequency[g]))) for g, c in of_length.items()} for of_length in counts
        ]
        norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in weighted]
        return weighted, norms, sum(counts[1].values())  # coco-caption takes the number of bigrams for the length

    scores = []
    for answer, texts in zip(answers, cooked, strict=True):
        said, said_norm, said_length = vectors(_ngrams(tokens_of(answer)))
        total = 0.0
        for counts in texts:
            true, true_norm, true_length = vectors(counts)
            penalty = math.exp(-((said_length - true_length) ** 2) / (2 * sigma**2))
            for n in range(4):
                inner = sum(min(value, true[n].get(gram, 0.0)) * true[n].get(gram, 0.0) for gram, value in said[n].items())
                scale = said_norm[n] * true_norm[n]
                total += penalty * (inner / scale if scale else inner) / 4
        scores.append(10 * total / len(texts))
    return np.array(scores)
