"""The stage runner of quickstart.py and reproduce.py: each stage once, in order, and what it says when one fails."""

import sys
from pathlib import Path

import pytest

from encoder.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from pipeline import in_order  # noqa: E402
from stages import Stage, run_stages  # noqa: E402


def append(path: Path, text: str) -> list[str]:
    return [sys.executable, "-c", f"open({str(path)!r}, 'a').write({text!r})"]


def test_each_stage_runs_once_and_again_when_its_commands_change(tmp_path):
    seen = tmp_path / "seen"
    stages = [Stage("a", "first", [append(seen, "a")]), Stage("b", "second", [append(seen, "b")])]
    run_stages(stages, tmp_path / "run")
    run_stages(stages, tmp_path / "run")
    assert seen.read_text() == "ab"
    run_stages([stages[0], Stage("b", "second", [append(seen, "B")])], tmp_path / "run")
    assert seen.read_text() == "abB"
    # A stage before others changes what these are made from, so they run again too.
    run_stages([Stage("a", "first", [append(seen, "A")]), stages[1]], tmp_path / "run")
    assert seen.read_text() == "abBAb"


def test_a_stage_runs_again_when_a_recipe_it_names_changes(tmp_path):
    seen, recipe = tmp_path / "seen", tmp_path / "recipe.yaml"
    recipe.write_text("steps: 1")
    stages = [Stage("a", "first", [in_order([[*append(seen, "a"), str(recipe)]])])]
    for text in ("steps: 1", "steps: 1", "steps: 2"):
        recipe.write_text(text)
        run_stages(stages, tmp_path / "run")
    assert seen.read_text() == "aa"


def test_a_failed_stage_is_named_with_the_end_of_its_log_and_is_tried_again(tmp_path):
    flag, seen = tmp_path / "flag", tmp_path / "seen"
    code = f"import os, sys\nif not os.path.exists({str(flag)!r}): sys.exit('no flag here')\nopen({str(seen)!r}, 'a').write('c')"
    stages = [Stage("a", "first", [append(seen, "a")]), Stage("c", "third", [[sys.executable, "-c", code]])]
    with pytest.raises(DataError, match="stage 'c' failed with exit code 1") as error:
        run_stages(stages, tmp_path / "run")
    assert "no flag here" in str(error.value)
    flag.touch()
    run_stages(stages, tmp_path / "run")
    assert seen.read_text() == "ac"


def test_commands_side_by_side_stop_when_one_fails(tmp_path):
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(DataError, match="exit code 3"):
        run_stages([Stage("s", "both", [slow, [sys.executable, "-c", "import sys; sys.exit(3)"]])], tmp_path / "run")


def test_in_order_stops_at_the_first_failure(tmp_path):
    seen = tmp_path / "seen"
    failing = [sys.executable, "-c", "import sys; sys.exit(1)"]
    with pytest.raises(DataError):
        run_stages([Stage("s", "chain", [in_order([append(seen, "x"), failing, append(seen, "y")])])], tmp_path / "run")
    assert seen.read_text() == "x"
