"""Recipes and flags: one list of fields, one sentence for what is wrong."""

import argparse
from dataclasses import dataclass

import pytest

from encoder.arguments import add_fields, build, field_help, read_recipe
from encoder.errors import DataError


@dataclass
class Settings:
    """For the test.

    folder: where it is
    steps: how many,
        in all
    rate, other_rate: how fast
    clip: a bound, 100% of it
    wide: whether
    train: parts that learn
    """

    folder: str
    steps: int = 10
    rate: float = 1e-3
    other_rate: float | None = None
    clip: str | None = "x"
    wide: bool = False
    train: list[str] = ()


FIELDS = {"folder", "steps", "rate", "other_rate", "clip", "wide", "train"}


def parse(*flags: str) -> dict:
    parser = argparse.ArgumentParser()
    add_fields(parser, Settings)
    return vars(parser.parse_args(flags))


def test_help_is_the_docstring():
    texts = field_help(Settings)
    assert texts["folder"] == "where it is" and texts["steps"] == "how many, in all"
    assert texts["rate"] == texts["other_rate"] == "how fast"
    parser = argparse.ArgumentParser()
    add_fields(parser, Settings)
    shown = " ".join(parser.format_help().split())
    assert "how many, in all (default 10)" in shown and "100% of it" in shown and "where it is (required)" in shown


def test_flags_are_typed_and_absent_where_not_given():
    assert parse() == {}
    got = parse("--steps", "1e3", "--rate", "5e-4", "--other_rate", "none", "--wide", "true", "--train", "a", "b")
    assert got == {"steps": 1000, "rate": 5e-4, "other_rate": None, "wide": True, "train": ["a", "b"]}
    assert parse("--other_rate", "2")["other_rate"] == 2.0


@pytest.mark.parametrize(
    "flags", [["--steps", "ten"], ["--steps", "1.5"], ["--wide", "yes"], ["--rate", "fast"], ["--stepz", "1"]]
)
def test_bad_flags_exit_with_usage(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*flags)
    assert stopped.value.code == 2
    assert flags[0].strip("-") in capsys.readouterr().err


def test_recipe_values_and_flags_meet_in_build(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("folder: here\nrate: 1e-4\nother_rate: 3\nsteps: 7\n")
    values = read_recipe(path, FIELDS) | {"steps": 9}
    assert build(Settings, values) == Settings("here", 9, 1e-4, 3.0)
    assert isinstance(build(Settings, values).rate, float)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("step: 3", "field 'step' is not known; did you mean 'steps'"),
        ("zzz: 3", "field 'zzz' is not known; known fields: clip, folder"),
        ("- 3", "holds a list; write one 'field: value' a line"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path, text, sentence):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=sentence) as raised:
        read_recipe(path, FIELDS)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_recipe_and_an_empty_one(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml", FIELDS)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_recipe(tmp_path / "empty.yaml", FIELDS) == {}


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({}, "'folder' is not given; set it in the recipe or with --folder"),
        ({"folder": "a", "rate": "fast"}, "'rate' is 'fast'; a number is needed"),
        ({"folder": "a", "steps": "many"}, "'steps' is 'many'; a whole number is needed"),
        ({"folder": "a", "steps": 2.5}, "'steps' is '2.5'; a whole number is needed"),
        ({"folder": "a", "steps": True}, "'steps' is 'True'; a whole number is needed"),
        ({"folder": "a", "rate": None}, "'rate' is 'None'; a number is needed"),
        ({"folder": "a", "wide": "yes please"}, "'wide' is 'yes please'; true or false is needed"),
        ({"folder": 3}, "'folder' is '3'; a text is needed"),
        ({"folder": "a", "train": "projector"}, "'train' is 'projector'; a list is needed"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(values, sentence):
    with pytest.raises(DataError, match=sentence):
        build(Settings, values)


def test_a_null_is_allowed_where_the_field_allows_it():
    settings = build(Settings, {"folder": "a", "other_rate": None, "clip": None})
    assert settings.other_rate is None and settings.clip is None
