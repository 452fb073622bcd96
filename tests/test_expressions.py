"""Every expression is true of one object only, judged by an evaluator that reads the English and knows nothing else."""

import re
from random import Random

import pytest

from encoder.data.expressions import KINDS, Expression, NamedBox, refer, unique_expressions
from encoder.data.pictures import load_library
from encoder.data.scenes import PictureLibrary, SceneConfig, draw_scene

ORDINALS = {"first": 0, "second": 1, "third": 2}
SIZES = {"smaller": min, "smallest": min, "bigger": max, "biggest": max}
# How far an object lies in the direction that the words name; larger is further. In fractions of the canvas.
FURTHER = {"left": lambda x, y: -x, "right": lambda x, y: x, "top": lambda x, y: -y, "bottom": lambda x, y: y}
RELATIONS = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}


def judged(text, objects, width, height):
    """Objects that satisfy the English under any reading, without margins: (name, box) pairs -> set of indices."""
    centres = [((x1 + x2) / 2 / width, (y1 + y2) / 2 / height) for _, (x1, y1, x2, y2) in objects]
    sides = [max(x2 - x1, y2 - y1) for _, (x1, y1, x2, y2) in objects]
    everyone = set(range(len(objects)))

    match = re.fullmatch(r"the (.+?)(?: (left of|right of|above|below) the (.+))?", text)
    head, relation, anchor = match.groups()
    related = everyone
    if relation:
        anchors = [index for index, (name, _) in enumerate(objects) if name == anchor]
        assert len(anchors) == 1, f"'{anchor}' is no single object"
        further = FURTHER[RELATIONS[relation]]
        related = {index for index in everyone if further(*centres[index]) > further(*centres[anchors[0]])}
    placed = everyone
    if match := re.fullmatch(r"(.+) (?:on the (left|right)|at the (top|bottom))", head):
        head, further = match[1], FURTHER[match[2] or match[3]]
        placed = {index for index in everyone if further(*centres[index]) > further(0.5, 0.5)}
    order = None
    if match := re.fullmatch(r"(first|second|third) (.+) from the (left|right|top|bottom)", head):
        order, head, further = ORDINALS[match[1]], match[2], FURTHER[match[3]]
    size = None
    if match := re.fullmatch(r"(smaller|smallest|bigger|biggest) (.+)", head):
        size, head = match[1], match[2]
    named = {index for index, (name, _) in enumerate(objects) if name == head}
    assert named, f"nothing is called '{head}'"

    if order is not None:
        return {sorted(named, key=lambda index: -further(*centres[index]))[order]}
    if size:
        readings = []
        for compared in (named & related, named):  # the smaller of those there; or the smallest of all, which is there
            if compared:
                extreme = SIZES[size](sides[index] for index in compared)
                readings.append({index for index in compared & related if sides[index] == extreme})
        compared = named & related
        assert len(compared) == 2 if size in ("smaller", "bigger") else len(compared) > 2
        return set.union(*readings)
    return named & related & placed


@pytest.fixture(scope="module")
def library():
    return PictureLibrary(load_library("base", 0)[0])


@pytest.mark.parametrize("config", [SceneConfig(), SceneConfig(num_objects=(5, 6), repeat_fraction=1.0)])
def test_one_object_satisfies_each_expression(library, config):
    kinds = dict.fromkeys(KINDS, 0)
    for index in range(300):
        scene = draw_scene(config, library, seed=11, index=index)
        objects = [(item.name, item.box) for item in scene.objects]
        for target, text, kind in scene.expressions:
            assert judged(text, objects, *scene.image.size) == {target}, (index, text)
            kinds[kind] += 1
    assert all(count >= 20 for count in kinds.values()), kinds


def test_every_expression_found_is_unique_not_only_the_drawn_ones(library):
    config = SceneConfig(num_objects=(3, 6), repeat_fraction=1.0)
    for index in range(60):
        scene = draw_scene(config, library, seed=12, index=index)
        objects = [(item.name, item.box) for item in scene.objects]
        for target, expressions in enumerate(unique_expressions(scene.objects, *scene.image.size)):
            assert len(set(map(str, expressions))) == len(expressions)
            for expression in expressions:
                assert judged(str(expression), objects, *scene.image.size) == {target}, str(expression)


def square(name, x, y, side=10.0):
    return NamedBox(name, (x, y, x + side, y + side))


def texts(objects, width=100, height=100):
    return [{str(expression) for expression in found} for found in unique_expressions(objects, width, height)]


def test_names_alone_only_where_unique():
    one, two, bus = texts([square("apple", 0, 0), square("apple", 60, 60), square("bus", 45, 0)])
    assert "the bus" in bus and "the apple" not in one | two
    assert {"the apple on the left", "the apple left of the bus", "the first apple from the left"} <= one


def test_close_calls_are_left_out():
    # 4 px apart across, sizes 10 and 11: nothing across and no size may be said, up and down may.
    one, two = texts([square("apple", 40, 10), square("apple", 44, 60, 11)])
    assert one == {"the apple at the top", "the first apple from the top", "the second apple from the bottom"}
    assert two == {"the apple at the bottom", "the first apple from the bottom", "the second apple from the top"}


def test_an_unclear_relation_of_another_apple_spoils_it():
    # The first apple is clearly left of the bus, the second lies 5 px to its left: a person might mean either.
    one, _, _ = texts([square("apple", 5, 0), square("apple", 45, 60), square("bus", 50, 30)])
    assert "the apple left of the bus" not in one
    assert "the apple above the bus" in one


def test_size_among_those_related():
    apples = [square("apple", 5, 5, 20), square("apple", 10, 50, 12), square("apple", 80, 30, 6)]
    _, small_left, smallest, _ = texts([*apples, square("bus", 45, 30)])
    assert "the smaller apple left of the bus" in small_left
    assert "the smallest apple" in smallest and "the smallest apple" not in small_left


def test_texts_of_each_kind():
    assert str(Expression("red heart")) == "the red heart"
    assert str(Expression("star", size="big", num_compared=3)) == "the biggest star"
    assert str(Expression("heart", order=1, direction="left")) == "the second heart from the left"
    assert str(Expression("bus", direction="top")) == "the bus at the top"
    combined = Expression("apple", size="small", direction="left", anchor="bus")
    assert (str(combined), combined.kind) == ("the smaller apple left of the bus", "size_relation")


def test_draws_are_seeded_and_mix_kinds():
    objects = [square("apple", 0, 0, 20), square("apple", 60, 60), square("bus", 45, 0)]
    drawn = refer(objects, 100, 100, Random(3), per_object=4)
    assert drawn == refer(objects, 100, 100, Random(3), per_object=4)
    for target in range(2):
        kinds = [kind for index, _, kind in drawn if index == target]
        assert len(kinds) == 4 and len(set(kinds)) >= 3


def test_twins_on_one_spot_get_nothing():
    assert refer([square("apple", 10, 10), square("apple", 10, 10)], 100, 100, Random(0), 3) == []
