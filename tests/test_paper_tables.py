"""The paper's tables with own rows: published averages, columns of a run, Markdown, LaTeX and HTML of the same numbers."""

import re
import sys

import pytest

from eval import compare
from eval.comparison import load_runs
from eval.paper_tables import (
    PUBLISHED_BENCH,
    PUBLISHED_REFERRING,
    as_html,
    as_latex,
    as_markdown,
    grouped,
    paper_tables,
    tex,
    with_average,
)
from eval.predictions import Prediction, PredictionLog, Target

BOX = (10.0, 10.0, 30.0, 30.0)
SPLITS = [
    *(f"refcoco/{split}" for split in ("val", "testA", "testB")),
    *(f"refcoco+/{split}" for split in ("val", "testA", "testB")),
    *(f"refcocog/{split}" for split in ("val", "test")),
    *(f"flickr30k_entities/{split}" for split in ("val", "test")),
    *(f"reflvis/{split}" for split in ("box", "point", "free_form")),
]


def write_run(folder, right: int, splits=SPLITS):
    """Four questions a split, the first `right` of them answered right."""
    for name in splits:
        benchmark, split = name.split("/")
        task = {"reflvis": "choice", "flickr30k_entities": "phrases"}.get(benchmark, "grounding")
        choice = {"answers": ("car",), "choices": ("car", "bus")} if task == "choice" else {}
        targets = [Target(f"{i}-0", f"{i}.png", 80, 60, "x", BOX, "", "people", **choice) for i in range(4)]
        protocol = {"benchmark": benchmark, "split": split, "task": task, "completeness": "published", "codec": "int1000"}
        log = PredictionLog(folder / benchmark / split, protocol, {"kind": "mllm"}, targets, {"images": "gone"})
        words = {True: ("[100, 100, 300, 300]", "a car"), False: ("[000, 000, 050, 050]", "a cartwheel")}
        log.append([
            Prediction(t.id, t.image, "x?", words[i < right][task == "choice"], BOX if i < right else (0.0, 0.0, 5.0, 5.0))
            for i, t in enumerate(targets)
        ])  # fmt: skip
    return folder


def test_averages_are_those_that_the_paper_prints():
    """But for the rounding of the columns, each by up to half a tenth."""
    for row in (*PUBLISHED_REFERRING.values(), *PUBLISHED_BENCH.values()):
        assert with_average(row[:-1])[-1] == (None if row[-1] is None else pytest.approx(row[-1], abs=0.06))
    assert {len(row) for row in PUBLISHED_REFERRING.values()} == {14} and {len(row) for row in PUBLISHED_BENCH.values()} == {4}


def test_own_rows_stand_below_the_published_ones_in_every_form(tmp_path, monkeypatch):
    runs = [f"our_cloc={write_run(tmp_path / 'a', 3)}", f"clip={write_run(tmp_path / 'b', 1, SPLITS[:4])}"]
    (table,) = paper_tables(load_runs(runs))
    rows = {name: values for name, values, published in table.rows if not published}
    # By Ferret's rule "a cartwheel" is a car: RefLVIS is all right, as its own script would say.
    assert rows["our_cloc"] == (100.0,) * 3 + (75.0,) * 10 + (pytest.approx((300 + 750) / 13),)
    assert rows["clip"] == (None,) * 3 + (25.0,) * 4 + (None,) * 7
    assert [published for _, _, published in table.rows] == [True] * 8 + [False] * 2
    numbers = [re.findall(r"\d+\.\d", text) for text in (as_markdown(table), as_latex(table), as_html(table))]
    assert numbers[0] == numbers[1] == numbers[2] and len(numbers[0]) == 7 * 14 + 12 + 14 + 4
    assert r"our\_cloc & 100.0" in as_latex(table) and as_latex(table).count(r"\midrule") == 2
    rows = [line for line in as_latex(table).splitlines() if line.endswith(r"\\")]
    assert (
        all(line.count("&") == 14 for line in rows[1:])
        and r"\multicolumn{3}{c}{RefCOCO+} & \multicolumn{2}{c}{RefCOCOg}" in rows[0]
    )
    assert r"\cmidrule(lr){2-4}\cmidrule(lr){5-7}" in as_latex(table) and r"\cmidrule(lr){13-14}" in as_latex(table)
    assert as_html(table).count("<tr>") + as_html(table).count('<tr class="own">') == 2 + 8 + 2
    assert grouped(("A x", "A y", "B x", "average")) == [("A", ["x", "y"]), ("", ["B x"]), ("", ["average"])]
    assert tex("50% & a_b") == r"50\% \& a\_b"

    monkeypatch.setattr(sys, "argv", ["compare.py", *runs, "--out", str(tmp_path / "report"), "--examples", "0"])
    compare.main()
    for name in ("report.md", "report.tex", "report.html"):
        text = (tmp_path / "report" / name).read_text()
        assert "81.7" in text and "75.0" in text and "our" in text
    line = next(x for x in (tmp_path / "report/report.md").read_text().splitlines() if x.startswith("| refcoco/val | acc@0.5"))
    assert "| 75.0 | 25.0 | +50.0 [" in line and "| 2 : 0 | 0.500 | 4 |" in line


def test_no_table_for_runs_without_its_columns(tmp_path):
    runs = [str(write_run(tmp_path / name, 2, ["own_set/val"])) for name in ("a", "b")]
    assert paper_tables(load_runs(runs)) == []
