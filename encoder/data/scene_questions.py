"""Questions about scenes as LLaVA records: several in a conversation, or one a record."""

from random import Random

import numpy as np

from encoder.data.prompts import GROUNDING_QUESTION, REFERRING_QUESTION
from encoder.data.scenes import DrawnScene
from encoder.masks import inner_pixels, plain_run_lengths


def conversation(drawn: DrawnScene, seed: int, turns: int) -> dict:
    """One LLaVA record: a seeded mix of questions about a scene, about two thirds of them for a box.

    Every object is asked about at most once, and an object that is asked for its name shares it with nothing that the
    other turns name, so that no turn gives away another's answer.
    """
    rng = Random(f"{seed}/conversation/{drawn.name}")
    objects = drawn.scene.objects
    order = list(range(len(objects)))
    rng.shuffle(order)
    names = {item.name for item in objects}
    num_turns = min(turns, len(objects))
    num_referring = num_turns // 3 + (rng.random() < num_turns % 3 / 3)
    if len(names) == 1:  # either kind would give the other's answer away
        num_referring = int(rng.random() < 1 / 3)
    referring: dict[str, int] = {}
    for index in order:
        if len(referring) < min(num_referring, max(1, len(names) - 1)):
            referring.setdefault(objects[index].name, index)
    texts: dict[int, list[str]] = {}
    for index, text, _ in drawn.scene.expressions:
        if not any(_mentions(text, name) for name in referring):
            texts.setdefault(index, []).append(text)
    grounding = [index for index in order if index in texts][: num_turns - len(referring)]
    if not referring and not grounding:  # nothing is clearly true of any object: ask for a name instead
        referring = {objects[order[0]].name: order[0]}
    chosen = sorted([*referring.values(), *grounding])
    asked = list(enumerate(chosen))
    rng.shuffle(asked)
    messages = []
    for region, index in asked:
        messages += _where(rng.choice(texts[index]), region) if index in grounding else _what(objects[index].name, region)
    return _llava_record(drawn, drawn.name, messages, [_box(drawn, index) for index in chosen])


def single_questions(drawn: DrawnScene, seed: int, number: int) -> list[dict]:
    """Up to `number` LLaVA records of one question each about a scene, a third of them for a name; none gives another's
    answer away, since each is a conversation of its own. An object may be asked for more than once, in other words."""
    rng = Random(f"{seed}/questions/{drawn.name}")
    objects, expressions = drawn.scene.objects, drawn.scene.expressions
    num_names = min(len(objects), number // 3 + (rng.random() < number % 3 / 3))
    asked = [(index, _what(objects[index].name, 0)) for index in rng.sample(range(len(objects)), num_names)]
    chosen = rng.sample(expressions, min(len(expressions), number - num_names))
    asked += [(index, _where(text, 0)) for index, text, _ in chosen]
    return [
        _llava_record(drawn, f"{drawn.name}/{position}", messages, [_box(drawn, index)])
        for position, (index, messages) in enumerate(asked)
    ]


def name_questions(drawn: DrawnScene) -> list[dict]:
    """One LLaVA record for each object of a scene: what is in its box?"""
    return [
        _llava_record(drawn, f"{drawn.name}/name/{index}", _what(item.name, 0), [_box(drawn, index)])
        for index, item in enumerate(drawn.scene.objects)
    ]


def pointed_questions(drawn: DrawnScene, seed: int) -> list[dict]:
    """One LLaVA record for each object of a scene: what is in its box, at a point of it, under its outline? The three ways take
    turns, so that each has a third of all objects."""
    rng = Random(f"{seed}/pointed/{drawn.name}")
    ways = (_box, lambda drawn, index: _point(drawn, index, rng), _outline)
    first = rng.randrange(len(ways))
    return [
        _llava_record(
            drawn,
            f"{drawn.name}/pointed/{index}",
            _what(item.name, 0),
            [ways[(first + index) % len(ways)](drawn, index)],
        )
        for index, item in enumerate(drawn.scene.objects)
    ]


def _box(drawn: DrawnScene, index: int) -> dict:
    return {"box": list(drawn.scene.objects[index].box)}


def _outline(drawn: DrawnScene, index: int) -> dict:
    """All of its pixels, those that later objects cover included, as in the instances files."""
    return {"mask": plain_run_lengths(drawn.scene.objects[index].on_canvas(*drawn.size))}


def _point(drawn: DrawnScene, index: int, rng: Random) -> dict:
    """The middle of any pixel of it that is seen, off its edge."""
    masks = [item.on_canvas(*drawn.size) for item in drawn.scene.objects[index:]]
    seen_HW = masks[0] & ~np.any(masks[1:], axis=0) if masks[1:] else masks[0]
    y, x = rng.choice(np.argwhere(inner_pixels(seen_HW)).tolist())
    return {"point": [x + 0.5, y + 0.5]}


def _where(expression: str, region: int) -> list[dict]:
    return _turn(GROUNDING_QUESTION.format(expression), f"<box:{region}>")


def _what(name: str, region: int) -> list[dict]:
    return _turn(REFERRING_QUESTION.format(f"<region:{region}>"), name)


def _turn(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _llava_record(drawn: DrawnScene, identity: str, messages: list[dict], regions: list[dict]) -> dict:
    """regions: what `<region:i>` and `<box:i>` count through"""
    messages[0]["value"] = "<image>\n" + messages[0]["value"]
    width, height = drawn.size
    return {
        "id": identity,
        "image": f"{drawn.name}.png",
        "width": width,
        "height": height,
        "conversations": messages,
        "regions": regions,
    }


def _mentions(text: str, name: str) -> bool:
    return f" {name} " in f" {text} "
