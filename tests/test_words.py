"""Scores of answers in words: POPE's rule, two-choice by our rule and by Ferret's, CIDEr against coco-caption's numbers."""

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
