"""Runs side by side: what is refused, differences against naive numbers, and the report as a reader gets it."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from encoder.errors import DataError
from eval import compare
from eval.comparison import choose_pairs, examples, load_run, load_runs
from eval.predictions import Prediction, PredictionLog, Target

PROTOCOL = {"completeness": "own data", "codec": "int1000", "geometry": "pad", "decoding": "greedy"}
KINDS = ("name", "size", "place")


def questions(num: int) -> list[Target]:
    rng = np.random.default_rng(7)
    left = rng.integers(0, 40, (num, 2))
    return [
        Target(str(i), f"{i // 2}.png", 80, 60, f"the apple {i} <b>", (*xy, *(xy + 20)), ("apple", "bus")[i % 2], KINDS[i % 3])
        for i, xy in enumerate(left.astype(float))
    ]


def write_run(folder, right: float, seed: int, num: int = 60, protocol=None, variants=("",), images="images", **changes):
    """A run with one grounding and one naming benchmark; `right` is the share of right answers, picked by `seed`."""
    rng = np.random.default_rng(seed)
    targets = questions(num)
    for benchmark, split, task in (("refcoco", "val", "grounding"), ("region_classification", "seen", "naming")):
        for variant in variants if task == "naming" else ("",):
            log = PredictionLog(
                folder / benchmark / split / variant,
                {"benchmark": benchmark, "split": split, "task": task, **PROTOCOL, **(protocol or {})},
                {"kind": "mllm", "weights_sha256": f"{seed:064d}", "variant": variant, **changes},
                targets,
                {"images": str(images)},
            )
            answers = []
            for target in targets:
                good = rng.random() < (right if variant != "crop" else 1.0)
                if task == "naming":
                    raw = target.category if good else "fish"
                    answers.append(Prediction(target.id, target.image, "What is <region:0>?", raw))
                else:
                    x1, y1, x2, y2 = target.box
                    words = {"float3": "[0.100, 0.200, 0.300, 0.400]"}.get((protocol or {}).get("codec"), "[100, 200, 300, 400]")
                    box = target.box if good else (x1 + 15, y1, x2 + 15, y2)
                    answers.append(Prediction(target.id, target.image, f"Where is {target.text}?", words, box))
            log.append(answers)
    return folder


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(30):
        Image.new("RGB", (80, 60), (8 * i, 120, 90)).save(tmp_path / f"images/{i}.png")
    return tmp_path / "images"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    compare.main()


def read_report(path):
    return json.loads((path / "report.json").read_text())


class Page(HTMLParser):
    """Collects tags that stay open, image sources, and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.text, self.links = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [value for key, value in attributes.items() if key in ("href", "src")]
        if tag == "img":
            self.images.append(attributes)
        elif tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_differences_are_the_naive_ones_and_the_table_says_so(tmp_path, pictures, monkeypatch, capsys):
    a = write_run(tmp_path / "cloc", 0.9, 1, images=pictures)
    b = write_run(tmp_path / "clip", 0.4, 2, images=pictures)
    run(monkeypatch, a, b, "--out", tmp_path / "report", "--note", "CLIP & CLOC were shipped")
    output = capsys.readouterr().out
    report = read_report(tmp_path / "report")
    row, stricter = report["rows"][:2]
    assert (row["name"], row["metric"], row["n"]) == ("refcoco/val", "acc_50", 60)
    assert (stricter["name"], stricter["metric"]) == ("refcoco/val", "acc_75") and stricter["chance"] < row["chance"]
    assert stricter["accuracies"] == row["accuracies"], "these boxes are right or far off"

    answers = {}
    for name in ("cloc", "clip"):
        lines = (tmp_path / name / "refcoco/val/predictions.jsonl").read_text().splitlines()
        answers[name] = [tuple(json.loads(line)["box"]) == t.box for line, t in zip(lines, questions(60), strict=True)]
    share = {name: sum(hits) / 60 for name, hits in answers.items()}
    difference = row["differences"][0]
    assert row["accuracies"]["cloc"]["value"] == pytest.approx(share["cloc"])
    assert difference["value"] == pytest.approx(share["cloc"] - share["clip"])
    assert 0 < difference["low"] < difference["value"] < difference["high"]

    line = next(line for line in output.splitlines() if line.startswith("refcoco/val"))
    assert f"{100 * share['cloc']:.1f}" in line and f"+{100 * difference['value']:.1f} [" in line and line.endswith("60")
    assert "*" in line and "ahead on 2 of 2 benchmark splits, behind on 0" in output
    assert output.strip().endswith(f"report: {tmp_path / 'report' / 'report.html'}")


def test_report_stands_alone_and_shows_both_answers(tmp_path, pictures, monkeypatch):
    a, b = (write_run(tmp_path / name, right, i, images=pictures) for i, (name, right) in enumerate((("a", 0.7), ("b", 0.5))))
    run(monkeypatch, a, b, "--out", tmp_path, "--examples", 3, "--note", "CLIP & CLOC were shipped")
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert page.open == [], "every tag is closed"
    assert page.links and all(link.startswith("data:image/") for link in page.links), "nothing is fetched"
    assert "<b>" not in "".join(page.images[i].get("alt") for i in range(3)) and "the apple" in html
    for attributes in page.images:
        kind, _, data = attributes["src"].partition(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.format == {"data:image/png": "PNG", "data:image/jpeg": "JPEG"}[kind] and min(image.size) > 50
    text = " ".join(page.text)
    for part in (
        "CLIP & CLOC were shipped",
        "Only a is right",
        "Only b is right",
        "Both are wrong",
        "IoU 1.00",
        "a: fish",
        "commit",
    ):
        assert part in text, part
    assert sum(attributes["src"].startswith("data:image/jpeg") for attributes in page.images) <= 18

    run(monkeypatch, a, b, "--out", tmp_path / "bare", "--examples", 0, "--images", tmp_path / "gone")
    assert "image/jpeg" not in (tmp_path / "bare/report.html").read_text()
    with pytest.raises(DataError, match="gone/.*png is not there; pass the folder of the pictures as --images"):
        run(monkeypatch, a, b, "--out", tmp_path / "bare", "--images", tmp_path / "gone")


def test_drawn_boxes_lie_where_they_are(tmp_path, pictures):
    from eval.comparison import Example
    from eval.report_pictures import draw_example

    entry = load_run(str(write_run(tmp_path / "a", 1.0, 0, images=pictures))).entries["refcoco/val"][0]
    target = entry.evaluation.targets[4]
    answers = (entry.evaluation.predictions[4], Prediction("4", "2.png", "", "", (60.0, 40.0, 75.0, 55.0)))
    jpeg = draw_example(Example(entry.evaluation, 4, answers, (1.0, 0.0)), pictures)
    pixels = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
    assert pixels.shape == (300, 400, 3), "80x60 px, long side 400"
    orange = np.abs(pixels - (0xD5, 0x5E, 0x00)).sum(2) < 60
    ys, xs = orange.nonzero()
    np.testing.assert_allclose([xs.min(), ys.min(), xs.max(), ys.max()], [300, 200, 375, 275], atol=4)
    blue = np.abs(pixels - (0x00, 0x72, 0xB2)).sum(2) < 60
    ys, xs = blue.nonzero()
    limits = np.clip(np.array(target.box) * 5, 3, [396, 296, 396, 296])
    np.testing.assert_allclose([xs.min(), ys.min(), xs.max(), ys.max()], limits, atol=14)  # the truth's dashes lie on top


def test_more_than_two_runs_and_named_pairs(tmp_path, pictures, monkeypatch, capsys):
    for i, (name, right) in enumerate((("a", 0.9), ("b", 0.6), ("c", 0.5))):
        write_run(tmp_path / name, right, i, images=pictures)
    arguments = [f"cloc={tmp_path / 'a'}", f"clip={tmp_path / 'b'}", f"before={tmp_path / 'c'}"]
    run(monkeypatch, *arguments, "--pairs", "cloc:clip", "cloc:before", "--out", tmp_path / "report", "--examples", 1)
    output = capsys.readouterr().out
    assert "cloc \N{MINUS SIGN} clip" in output and "cloc \N{MINUS SIGN} before" in output and "clip \N{MINUS SIGN}" not in output
    rows = read_report(tmp_path / "report")["rows"]
    assert [(d["first"], d["second"]) for d in rows[0]["differences"]] == [("cloc", "clip"), ("cloc", "before")]
    assert set(rows[0]["accuracies"]) == {"cloc", "clip", "before"}
    runs = load_runs(arguments)
    assert [p.title for p in choose_pairs(runs, None)] == ["cloc \N{MINUS SIGN} clip", "cloc \N{MINUS SIGN} before"]
    with pytest.raises(DataError, match="--pairs cloc:nobody needs two of the runs cloc, clip, before"):
        choose_pairs(runs, ["cloc:nobody"])


def test_the_best_way_of_reading_a_box_is_compared_and_the_others_named(tmp_path, pictures, monkeypatch, capsys):
    a = write_run(tmp_path / "cloc", 0.9, 1, variants=("prompter",), images=pictures)
    b = write_run(tmp_path / "clip", 0.2, 2, variants=("roialign-1", "roialign-2", "crop"), images=pictures)
    run(monkeypatch, a, b, "--out", tmp_path, "--examples", 0)
    output = capsys.readouterr().out
    assert re.search(r"seen: cloc by prompter; clip by crop \(better than roialign-\d, roialign-\d\)", output)
    row = next(row for row in read_report(tmp_path)["rows"] if row["name"] == "region_classification/seen")
    assert row["accuracies"]["clip"]["value"] == 1.0


def test_what_one_run_lacks_or_did_in_part_is_said(tmp_path, pictures, monkeypatch, capsys):
    a = write_run(tmp_path / "a", 0.9, 1, images=pictures, protocol={"completeness": "PARTIAL: 60 of 90"})
    b = write_run(tmp_path / "b", 0.5, 2, images=pictures, protocol={"completeness": "PARTIAL: 60 of 90"})
    (b / "region_classification/seen/run.json").unlink()
    run(monkeypatch, a, b, "--out", tmp_path, "--examples", 0)
    output = capsys.readouterr().out
    assert "note: region_classification/seen: not evaluated for b" in output
    assert "note: refcoco/val is PARTIAL: 60 of 90" in output
    assert "PARTIAL: 60 of 90" in (tmp_path / "report.html").read_text()


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    a = write_run(tmp_path / "a", 0.9, 1)
    for name, options, message in (
        ("codec", {"protocol": {"codec": "float3"}}, "protocol.codec is 'int1000' in a and 'float3' in codec"),
        ("fewer", {"num": 50}, "protocol.n is 60 in a and 50 in fewer"),
    ):
        other = write_run(tmp_path / name, 0.5, 2, **options)
        with pytest.raises(DataError, match=message):
            compare.refuse_different_protocol(load_runs([str(a), str(other)]))
    moved = write_run(tmp_path / "moved", 0.5, 2)
    for line in (moved / "refcoco/val/targets.jsonl", moved / "refcoco/val/predictions.jsonl"):
        line.write_text(line.read_text().replace('"id": "59"', '"id": "590"'))
    document = json.loads((moved / "refcoco/val/run.json").read_text())
    document["protocol"]["targets_sha256"] = "changed"
    (moved / "refcoco/val/run.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="refcoco/val: a was asked id 59, moved id 590"):
        compare.refuse_different_protocol(load_runs([str(a), str(moved)]))
    with pytest.raises(DataError, match="a comparison needs two run folders"):
        load_runs([str(a)])
    with pytest.raises(DataError, match="two runs are called the same"):
        load_runs([str(a), str(a)])
    with pytest.raises(DataError, match="nothing is not a folder"):
        load_runs([str(a), str(tmp_path / "nothing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no evaluation"):
        load_runs([str(a), str(tmp_path / "empty")])


def test_examples_are_sorted_by_disagreement_one_per_picture(tmp_path):
    entries = [
        load_run(str(write_run(tmp_path / name, right, i))).entries["refcoco/val"]
        for i, (name, right) in enumerate((("a", 0.6), ("b", 0.4)))
    ]
    groups = examples(entries[0], entries[1], 100)
    hits = [entry[0].scored.hits for entry in entries]
    assert groups["first"][0] == ((hits[0] == 1) & (hits[1] == 0)).sum()
    assert groups["second"][0] == ((hits[0] == 0) & (hits[1] == 1)).sum()
    assert groups["neither"][0] == ((hits[0] == 0) & (hits[1] == 0)).sum()
    for _, chosen in groups.values():
        gaps = [abs(a - b) for a, b in (example.scores for example in chosen)]
        assert gaps == sorted(gaps, reverse=True)
        pictures = [example.evaluation.targets[example.index].image for example in chosen]
        assert len(set(pictures)) == len(pictures) > 0


def test_answers_that_are_more_or_less_right_are_not_called_right_or_wrong(tmp_path, pictures, monkeypatch):
    """Descriptions: who is better on how many questions, the greatest difference first."""
    texts = [f"a {'very ' * i}big dog near the {'tree' if i % 2 else 'old house'}" for i in range(5)]
    box = (0.0, 0.0, 80.0, 60.0)
    targets = [Target(str(i), f"{i}.png", 80, 60, text, box, "", answers=(text,)) for i, text in enumerate(texts)]
    # The first run says everything, but a half of question 1 and nothing on 2; the second nothing, but all of 1 and 2.
    said = {"a": [texts[0], texts[1][:12], "", texts[3], "x"], "b": ["x", texts[1], texts[2], texts[3], "x"]}
    for name, answers in said.items():
        protocol = {"benchmark": "visual_genome_describing", "split": "regions", "task": "describing", **PROTOCOL}
        log = PredictionLog(tmp_path / name / "vg/regions", protocol, {"kind": "mllm"}, targets, {"images": str(pictures)})
        log.append([Prediction(t.id, t.image, "", raw) for t, raw in zip(targets, answers, strict=True)])
    entries = [load_run(str(tmp_path / name)).entries["visual_genome_describing/regions"] for name in said]
    groups = examples(*entries, 9)
    assert {name: (number, [e.index for e in chosen]) for name, (number, chosen) in groups.items()} == {
        "first": (1, [0]), "second": (2, [2, 1]), "neither": (0, []),
    }  # fmt: skip
    run(monkeypatch, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "report")
    text = " ".join(Page((tmp_path / "report/report.html").read_text()).text)
    assert "B is better" in text and "2 of 5 questions (40.0%), most disagreement first" in text
    assert "is right" not in text and "both are wrong" not in text.lower() and "By kind of question" not in text
