"""Scores of answers in words: POPE's rule, two-choice by our rule and by Ferret's, CIDEr against coco-caption's numbers.

Each also against a plain second computation on 600 drawn answers.
"""

import math
import random
from collections import Counter

import numpy as np
import pytest

from eval.predictions import Prediction, Target
from eval.words import choice_hits, choice_report, chosen, cider, ferrets_choice, names_of, said_yes, yes_no_report

BOX = (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("raw", "yes"),
    [
        ("Yes", True), ("yes, there is a dog.", True), ("No", False), ("no, there is none.", False),
        ("There is not a dog in the image.", False), ("There is a dog. No cat.", True), ("Nothing there", True), ("", True),
        ("No, there isn't", False), ("The image shows no, dog", False),
    ],
)  # fmt: skip
def test_popes_rule(raw, yes):
    assert said_yes(raw) is yes


def test_precision_recall_and_f1_are_those_of_a_table_counted_by_hand():
    truth, said = "yyyynnnnnn", "yyynyynnnn"
    targets = [Target(str(i), "", 1, 1, "", BOX, "", "", (), ({"y": "yes", "n": "no"}[t],)) for i, t in enumerate(truth)]
    predictions = [Prediction(str(i), "", "", {"y": "Yes.", "n": "No."}[s]) for i, s in enumerate(said)]
    report = yes_no_report(targets, predictions)
    assert report == pytest.approx({"precision": 3 / 5, "recall": 3 / 4, "f1": 2 / 3, "yes_ratio": 0.5, "neither_yes_nor_no": 0})


CASES = {
    # answer -> (ours, Ferret's) where the true thing is a car, the other one a bus
    "It is a car.": (True, True),
    "A bus.": (False, False),
    "It is not a bus, but a car.": (True, True),
    "It is a car, not a bus.": (True, True),
    "It is a cart.": (None, True),
    "cars": (True, True),
    "It is a car or a bus.": (None, True),
    "a fish": (None, False),
    "It is no bus": (None, False),
    "Not sure, a Car": (True, False),
    "a nose near a car.": (True, False),
}


@pytest.mark.parametrize("answer", CASES)
def test_the_two_choice_rules(answer):
    ours, ferret = CASES[answer]
    assert chosen(answer, ["car"], ["bus"]) is ours
    assert ferrets_choice(answer, "car", []) is ferret


def test_the_longer_of_two_names_within_one_another_counts():
    assert chosen("It is a hot dog.", ["hot dog"], ["dog"]) is True
    assert chosen("It is a hot dog.", ["dog"], ["hot dog"]) is False
    assert chosen("It is a dog, not a hot dog.", ["dog"], ["hot dog"]) is True


def test_names_are_taken_apart_as_lvis_writes_them():
    assert names_of("bow_(weapon)") == ["bow", "weapon"] and names_of("alarm_clock") == ["alarm clock"]
    assert ferrets_choice("an archery bow", "bow_(weapon)", ["bow_(weapon)", "archery_bow"])


def test_both_orders_and_likelihoods():
    def target(place, choices):
        return Target(place, "", 1, 1, "", BOX, "", "", (), ("car", "auto"), choices)

    targets = [target("7-0", ("car", "bus")), target("7-1", ("bus", "car")), target("8-0", ("car", "bus"))]
    words = [Prediction(t.id, "", "", raw) for t, raw in zip(targets, ("a car", "a bus", "an auto"), strict=True)]
    hits = choice_hits(targets, words)
    assert hits["two_choice"].tolist() == hits["ferret_rule"].tolist() == [1, 0, 1]
    report = choice_report(targets, words, hits["two_choice"])
    assert report == {"right_name_first": 1.0, "right_name_second": 0.0, "right_in_both_orders": 0.0, "both_or_neither_named": 0}
    pairs = ((-1.0, -2.0), (-1.0, -2.0), (-3.0, -3.0))
    compared = [Prediction(t.id, "", "", "", likelihoods=p) for t, p in zip(targets, pairs, strict=True)]
    assert {name: values.tolist() for name, values in choice_hits(targets, compared).items()} == {"two_choice": [1, 0, 0.5]}


def test_cider_has_coco_captions_values():
    """Values printed by pycocoevalcap 1.2's Cider for these texts, which hold no punctuation."""
    answers = ["a man in a red shirt", "the dog on the left", "a bus", "two women"]
    references = [["a man in a red shirt"], ["a dog lying on the grass", "the brown dog"], ["a yellow bus"], ["a cat"]]
    np.testing.assert_allclose(cider(answers, references), CIDER, atol=1e-9)


CIDER = [10.0, 1.4168393235704166, 1.743384349760141, 0.0]

PIECES = ["car", "cars", "bus", "cart", "hot", "dog", "dogs", "a", "is", "no", "No", "not", "Not", "nose", "nothing", "but", ","]
PIECES += [".", ";", "Car", "abut", "hot dog", "hot dogs"]


def drawn_answers(count: int, pieces=PIECES) -> list[str]:
    """Up to ten words and signs, a blank between two words, none before a sign."""
    rng, answers = random.Random(5), []
    for _ in range(count):
        text = " ".join(rng.choices(pieces, k=rng.randint(0, 10)))
        answers.append(text.replace(" ,", ",").replace(" .", ".").replace(" ;", ";"))
    return answers


def plain_pope(text: str) -> bool:
    """As the authors' script reads an answer, letter by letter."""
    word, words = "", []
    for letter in text + ".":
        if letter == ".":
            words.append(word)
            break
        if letter == " ":
            words.append(word)
            word = ""
        elif letter != ",":
            word += letter
    return all(word not in ("No", "no", "not") for word in words)


def plain_ferret(text: str, names: list[str]) -> bool:
    """A blank, `not` or `no` at a word's start and all up to the next comma or full stop go; then a name anywhere counts."""
    for start in (" not", " no"):
        kept, place = "", 0
        while place < len(text):
            ends = [i for i in range(place + len(start), len(text)) if text[i] in ",."]
            if text.startswith(start, place) and ends:
                place = ends[0] + 1
            else:
                kept += text[place]
                place += 1
        text = kept
    return any(name in text for name in names)


def plain_choice(text: str, right: list[str], wrong: list[str]) -> bool | None:
    """Our rule on a list of words, without regular expressions."""
    words, denied = [], False
    for word in "".join(f" {c} " if c in ",.;" else c for c in text.lower()).split():
        if word in ("no", "not"):
            denied = True
        elif word in (",", ".", ";", "but"):
            denied = False
        words.append("-" if denied else word)
    said = set()
    for name in sorted([*right, *wrong], key=len, reverse=True):
        parts = name.split()
        for i in range(len(words) - len(parts) + 1):
            *before, last = words[i : i + len(parts)]
            if before == parts[:-1] and last in (parts[-1], parts[-1] + "s", parts[-1] + "es"):
                said.add(name in right)
                words[i : i + len(parts)] = ["/"] * len(parts)
    return said.pop() if len(said) == 1 else None


def test_each_rule_equals_a_plain_second_one_on_600_drawn_answers():
    answers = drawn_answers(600)
    assert [said_yes(text) for text in answers] == [plain_pope(text) for text in answers]
    ferret = [plain_ferret(text, ["car", "auto"]) for text in answers]
    assert [ferrets_choice(text, "car", ["auto"]) for text in answers] == ferret
    for right, wrong in ((["car"], ["bus"]), (["dog"], ["hot dog"]), (["hot dog"], ["dog", "car"])):
        ours = [plain_choice(text, right, wrong) for text in answers]
        assert [chosen(text, right, wrong) for text in answers] == ours
        assert min(Counter(ours)[verdict] for verdict in (True, False, None)) > 20
    assert 100 < sum(ferret) < 500 and 100 < sum(map(plain_pope, answers)) < 500


def plain_cider(answers: list[str], references: list[list[str]]) -> list[float]:
    """The paper's formula with dense vectors; the length is the number of bigrams, as in coco-caption."""

    def grams(text: str, n: int) -> list[tuple]:
        words = text.split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    scores = np.zeros(len(answers))
    for n in (1, 2, 3, 4):
        known = sorted({g for text in [*answers, *(r for texts in references for r in texts)] for g in grams(text, n)})
        place = {gram: i for i, gram in enumerate(known)}
        seen = np.zeros(len(known))
        for texts in references:
            seen[[place[g] for g in {g for text in texts for g in grams(text, n)}]] += 1
        idf = math.log(len(references)) - np.log(np.maximum(1, seen))

        def vector(text: str, n=n, place=place, idf=idf) -> np.ndarray:
            counts = np.zeros(len(place))
            for gram in grams(text, n):
                counts[place[gram]] += 1
            return counts * idf

        for index, (answer, texts) in enumerate(zip(answers, references, strict=True)):
            a = vector(answer)
            for text in texts:
                b, gap = vector(text), len(grams(answer, 2)) - len(grams(text, 2))
                lengths = np.linalg.norm(a) * np.linalg.norm(b)
                cosine = np.minimum(a, b) @ b / lengths if lengths else 0.0
                scores[index] += 10 / 4 / len(texts) * math.exp(-(gap**2) / 72) * cosine
    return scores.tolist()


def test_cider_equals_the_plain_formula_on_600_drawn_answers():
    words = ["red", "bus", "man", "on", "the", "left", "dog", "two", "women", "grass"]
    texts = drawn_answers(2400, words)
    answers, references = texts[:600], [texts[600 + i : 601 + i + i % 3] for i in range(600)]
    found, expected = cider(answers, references), plain_cider(answers, references)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert np.mean(found > 0.1) > 0.3
