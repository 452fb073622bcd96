"""Referring expressions that are true of exactly one object of a scene, and clearly so.

Grammar, with `the` in front: [size | order] name [order's side | place | relation to another object]

    the red heart · the bigger star · the smallest star · the second heart from the left · the bus at the top
    the apple left of the bus · the smaller apple left of the bus

A predicate is true, false or unclear (None) of an object. An expression is kept only if it is true of one object and
false of every other one: whoever judges without margins then finds the same object. Boxes are xyxy pixels (x to the
right, y down), sizes are long sides in pixels, positions are box centres.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

SIZE_RATIO = 1.2  # a bigger object's long side is at least this many times the smaller one's
AXIS_MARGIN = 0.1  # centres differ by at least this fraction of the canvas along the axis that is spoken of
PLACE_MARGIN = 0.06  # "on the left": centre at least this fraction of the canvas away from the middle line

SIZE_WORDS = {"small": ("smaller", "smallest"), "big": ("bigger", "biggest")}
ORDINALS = ("first", "second", "third")
# direction: (axis 0 = x, 1 = y; sign that makes "further in this direction" larger; relation; place; side of an order)
DIRECTIONS = {
    "left": (0, -1, "left of", "on the left", "from the left"),
    "right": (0, 1, "right of", "on the right", "from the right"),
    "top": (1, -1, "above", "at the top", "from the top"),
    "bottom": (1, 1, "below", "at the bottom", "from the bottom"),
}
KINDS = ("name", "size", "place", "order", "relation", "size_relation")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class NamedBox:
    """What an expression can speak of: a name, and a box in pixels of the scene."""

    name: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def side(self) -> float:
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True)
class Expression:
    """A predicate over the objects of a scene.

    name: what the object is
    size: None, or "small" or "big", compared with the others of that name
    order: None, or 0, 1, 2 counted among all of that name from the side `direction`
    direction: of the order, the place or the relation; a key of `DIRECTIONS`
    anchor: name of the object that the relation starts from; that name is unique in the scene
    num_compared: objects that a size compares; two are "smaller, bigger", more are "smallest, biggest"
    """

    name: str
    size: str | None = None
    order: int | None = None
    direction: str | None = None
    anchor: str | None = None
    num_compared: int = 2

    @property
    def kind(self) -> str:
        if self.size:
            return "size_relation" if self.anchor else "size"
        if self.anchor:
            return "relation"
        if self.order is not None:
            return "order"
        return "place" if self.direction else "name"

    def __str__(self) -> str:
        words = ["the"]
        if self.size:
            comparative, superlative = SIZE_WORDS[self.size]
            words.append(comparative if self.num_compared == 2 else superlative)
        if self.order is not None:
            words.append(ORDINALS[self.order])
        words.append(self.name)
        if self.direction:
            _, _, relation, place, side = DIRECTIONS[self.direction]
            if self.anchor:
                words.append(f"{relation} the {self.anchor}")
            else:
                words.append(place if self.order is None else side)
        return " ".join(words)


class SceneGeometry:
    """The three-valued predicates over one scene's objects, each computed once.

    objects: the scene's objects; width, height: the canvas in pixels
    """

    def __init__(self, objects: Sequence[NamedBox], width: float, height: float):
        self.objects = objects
        self.names = [item.name for item in objects]
        self.sides = [item.side for item in objects]
        centres = [item.centre for item in objects]
        # Centres as fractions of the canvas: axis -> one number per object.
        self.along = ([x / width for x, _ in centres], [y / height for _, y in centres])
        self.groups: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            self.groups.setdefault(name, []).append(index)

    def relation(self, index: int, direction: str, anchor: int) -> bool | None:
        """Whether object `index` lies in `direction` from object `anchor`."""
        axis, sign = DIRECTIONS[direction][:2]
        gap = sign * (self.along[axis][index] - self.along[axis][anchor])
        return None if abs(gap) < AXIS_MARGIN else gap > 0

    def place(self, index: int, direction: str) -> bool | None:
        """Whether object `index` lies in the half of the canvas that `direction` names."""
        axis, sign = DIRECTIONS[direction][:2]
        gap = sign * (self.along[axis][index] - 0.5)
        return None if abs(gap) < PLACE_MARGIN else gap > 0

    def extreme(self, indices: Sequence[int], size: str) -> int | None:
        """The clearly smallest or biggest of at least two objects, or None."""
        if len(indices) < 2:
            return None
        ranked = sorted(indices, key=self.sides.__getitem__, reverse=size == "big")
        first, second = sorted((self.sides[ranked[0]], self.sides[ranked[1]]))
        return ranked[0] if second >= SIZE_RATIO * first else None

    def ordered(self, indices: Sequence[int], direction: str) -> list[int] | None:
        """The objects counted from that side, or None where two of them are level."""
        axis, sign = DIRECTIONS[direction][:2]
        ranked = sorted(indices, key=lambda index: -sign * self.along[axis][index])
        positions = [self.along[axis][index] for index in ranked]
        clear = all(abs(b - a) >= AXIS_MARGIN for a, b in zip(positions, positions[1:], strict=False))
        return ranked if clear else None

    def only(self, verdicts: dict[int, bool | None]) -> int | None:
        """The one object with True if all others have False, else None."""
        if None in verdicts.values():
            return None
        true = [index for index, verdict in verdicts.items() if verdict]
        return true[0] if len(true) == 1 else None


def unique_expressions(objects: Sequence[NamedBox], width: float, height: float) -> list[list[Expression]]:
    """Every expression of the grammar that is clearly true of exactly one object: per object, a list (may be empty).

    objects: the scene's objects, boxes xyxy in pixels; width, height: the canvas in pixels.
    """
    scene = SceneGeometry(objects, width, height)
    found: list[list[Expression]] = [[] for _ in objects]
    anchors = [(name, group[0]) for name, group in scene.groups.items() if len(group) == 1]
    for name, group in scene.groups.items():
        if len(group) == 1:
            found[group[0]].append(Expression(name))
        for size in SIZE_WORDS:
            target = scene.extreme(group, size)
            if target is not None:
                found[target].append(Expression(name, size=size, num_compared=len(group)))
        for direction in DIRECTIONS:
            target = scene.only({index: scene.place(index, direction) for index in group})
            if target is not None:
                found[target].append(Expression(name, direction=direction))
            ranked = scene.ordered(group, direction) if len(group) > 1 else None
            for order, index in enumerate((ranked or [])[: len(ORDINALS)]):
                found[index].append(Expression(name, order=order, direction=direction))
            for anchor_name, anchor in anchors:
                if anchor_name == name:
                    continue
                verdicts = {index: scene.relation(index, direction, anchor) for index in group}
                target = scene.only(verdicts)
                if target is not None:
                    found[target].append(Expression(name, direction=direction, anchor=anchor_name))
                for expression, target in _size_and_relation(scene, verdicts, direction, anchor_name):
                    found[target].append(expression)
    return found


def _size_and_relation(
    scene: SceneGeometry, verdicts: dict[int, bool | None], direction: str, anchor: str
) -> list[tuple[Expression, int]]:
    """'the smaller apple left of the bus': the smaller one of those left of the bus. Read the other way, the smallest
    apple of all, which is left of the bus, it means the same object or none."""
    if None in verdicts.values():
        return []
    related = [index for index, verdict in verdicts.items() if verdict]
    targets = {size: scene.extreme(related, size) for size in SIZE_WORDS}
    return [
        (Expression(scene.names[target], size, None, direction, anchor, num_compared=len(related)), target)
        for size, target in targets.items()
        if target is not None
    ]


def refer(objects: Sequence[NamedBox], width: float, height: float, rng: Random, per_object: int) -> list[tuple[int, str, str]]:
    """Draws up to `per_object` different expressions per object, as many kinds as there are.

    Returns (object index, expression with its article, kind). An object of which nothing is clearly true has none.
    """
    drawn = []
    for index, expressions in enumerate(unique_expressions(objects, width, height)):
        by_kind: dict[str, list[Expression]] = {}
        for expression in expressions:
            by_kind.setdefault(expression.kind, []).append(expression)
        for choices in by_kind.values():
            rng.shuffle(choices)
        kinds = list(by_kind)
        rng.shuffle(kinds)
        rounds = [by_kind[kind][turn] for turn in range(per_object) for kind in kinds if turn < len(by_kind[kind])]
        drawn.extend((index, str(expression), expression.kind) for expression in rounds[:per_object])
    return drawn
