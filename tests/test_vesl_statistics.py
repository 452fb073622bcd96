"""Table 1's numbers, the check for things that captions make up, and the page, on records whose answers are known."""

import json
import re

import pytest
from labelling_fixtures import encoded, write_tar

from encoder.errors import DataError
from encoder.vesl.hallucination import hallucination, head, named, read_objects
from encoder.vesl.sample_page import page
from encoder.vesl.stage_files import LabelFolder
from encoder.vesl.statistics import labelled_records, statistics, table_row, token_lengths


def region(*phrases, box=(1.0, 2.0, 20.0, 15.0)):
    return {"box": list(box), "phrases": list(phrases), "score": 0.5, "source": "vesl"}


def record(captions, queries, found, alt_text="an alt text"):
    return {"captions": captions, "queries": queries, "regions": [region(phrase) for phrase in found], "alt_text": alt_text}


RECORDS = [
    record(["A red bus. Two dogs sit near the bus."], ["a red bus", "two dogs", "the bus"], ["a red bus", "the bus"]),
    record(["a berry <b>pie</b>"], ["a berry pie"], ["a berry pie"]),
    record([], ["alt"], [], "an alt text of five words"),  # as labels of the alt-text have it: no caption to check
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("out")
    for number, fields in enumerate(RECORDS):
        fields = {"image": f"{number}.jpg", "width": 30, "height": 20} | fields
        fields = {key: value for key, value in fields.items() if key != "captions" or value}
        write_tar(path / f"{number:05d}.tar", {f"{number}.jpg": encoded(), f"{number}.json": json.dumps(fields).encode()})
    return LabelFolder(path)


def words(texts):
    return [len(text.split()) for text in texts]


def test_the_row_of_table_1(folder):
    found = statistics(folder, words)
    assert found == {
        "images": 3,
        "regions_per_image": 1.0,
        "image_text_tokens": pytest.approx((9 + 3 + 6) / 3),
        "region_text_tokens": pytest.approx((3 + 2 + 3) / 3),
        "regions": 3,
        "images_with_regions": 2,
        "phrases_asked_per_image": pytest.approx(5 / 3),
        "different_phrases": 3,
        "most_common_phrases": {"a red bus": 1, "the bus": 1, "a berry pie": 1},
    }
    assert table_row(found) == "3 images, 1.0 regions an image, image text of 6.0 tokens, region text of 2.7 tokens"


def test_tokens_are_those_of_the_text_alone(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    (length,) = token_lengths(tokenizer)(["small red bar"])
    assert length == len(tokenizer("small red bar")["input_ids"]) - 1  # the end mark
    assert token_lengths(tokenizer)([]) == []


def test_an_empty_folder_has_no_means(tmp_path):
    found = statistics(LabelFolder(tmp_path), words)
    assert found["images"] == 0 and found["regions_per_image"] is None
    assert table_row(found).startswith("0 images, - regions")


def test_chair_by_the_heads_of_phrases():
    found = hallucination(RECORDS)
    # Named: bus, dog | pie | -. Not found: dog, in the second of three sentences, in one of two captions.
    assert found["named"] == 3 and found["not_found"] == 1 and found["chair_i"] == pytest.approx(1 / 3)
    assert found["captions"] == 2 and found["chair_s"] == pytest.approx(1 / 2)
    assert found["sentences"] == 3 and found["sentence"] == pytest.approx(1 / 3)


def test_chair_by_a_list_of_things(tmp_path):
    (tmp_path / "things.txt").write_text("dog, puppy\nhot dog\nbus, coach\n\nwoman, women\n")
    names = read_objects(tmp_path / "things.txt")
    assert names["puppy"] == "dog" and names["coach"] == "bus"
    records = [
        record(["A puppy eats a hot dog beside a coach. Nobody else is here."], [], ["the dog", "the bus"]),
        record(["Two buses"], [], ["one bus"]),
    ]
    found = hallucination(records, names)
    assert (found["named"], found["not_found"]) == (4, 1)  # puppy, hot dog, coach | buses; the hot dog was not found
    assert (found["chair_s"], found["sentence"]) == (1 / 2, 1 / 3)
    (tmp_path / "twice.txt").write_text("dog, pup\nseal, pup\n")
    with pytest.raises(DataError, match="line 2: 'pup' is a dog and a seal"):
        read_objects(tmp_path / "twice.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="names nothing"):
        read_objects(tmp_path / "empty.txt")


def test_nothing_named_has_no_share():
    assert hallucination([record(["so it is"], [], [])])["chair_i"] is None
    assert hallucination([])["chair_s"] is None


@pytest.mark.parametrize(
    "phrase, expected",
    [("two red apples", "apple"), ("the berries", "berry"), ("glasses", "glass"), ("boxes", "box"), ("a bus", "bus"),
     ("dress", "dress"), ("Tennis", "tennis"), ("gas", "gas"), ("!", "")],
)  # fmt: skip
def test_heads(phrase, expected):
    assert head(phrase) == expected


def test_the_longer_name_counts():
    names = {"dog": "dog", "hot dog": "hot dog", "berry": "berry"}
    assert named("Hot dogs and berries", names) == {"hot dog", "berry"}
    assert named("a dogma", names) == set()


def test_the_page_shows_the_samples_and_nothing_is_fetched(folder):
    found = statistics(folder, words)
    chair = hallucination(record for _, _, record in labelled_records(folder))
    text = page(folder, found, chair, "words", samples=2, seed=1)
    assert text.count('class="card"') == 2 and text.count("data:image/jpeg;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', text)
    whole = page(folder, found, chair, "words", samples=9)
    assert whole.count('class="card"') == 3 and "a berry &lt;b&gt;pie&lt;/b&gt;" in whole and "<b>pie" not in whole
    assert "Not found by the detector: 33.3% of 3 things" in whole and "<td>11.6</td>" in whole
    assert page(folder, found, chair, "words", samples=2, seed=1) == text


def test_the_page_draws_the_most_confident_boxes(tmp_path):
    regions = [region(f"thing {n}") | {"score": n / 100} for n in range(25)]
    fields = {"image": "a.jpg", "width": 30, "height": 20, "captions": ["things"], "regions": regions}
    write_tar(tmp_path / "0.tar", {"a.jpg": encoded(), "a.json": json.dumps(fields).encode()})
    folder = LabelFolder(tmp_path)
    text = page(folder, statistics(folder, words), hallucination([fields]), "words", samples=1)
    assert "thing 24 0.24" in text and "thing 5 0.05" in text and "thing 4 0.04" not in text and "and 5 more" in text
