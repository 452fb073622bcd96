"""Scenes composed of named pictures: boxes exact by construction, captions, phrases and referring expressions.

A scene follows from (seed, split, index) and the configuration alone, so any number of processes draws the same ones.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image

from encoder.data.expressions import Box, NamedBox, refer
from encoder.data.pictures import Picture
from encoder.errors import DataError

VISIBLE_ALPHA = 128  # a pixel belongs to the object from this alpha on; boxes and occlusion count these
MAX_ATTEMPTS = 5000  # layouts tried for one scene before its configuration is called impossible
POSITIONS_TRIED = 24  # positions tried for one object; the first that overlaps little, or else the best, is taken
FREE_OVERLAP = 0.1  # "little": overlap of boxes, as a part of the object's own

# Muted colours, so that every cut-out stands out from them.
BACKGROUND_COLOURS = {
    "grey": (158, 160, 164),
    "beige": (214, 204, 182),
    "pale blue": (188, 204, 218),
    "pale green": (190, 208, 188),
    "pale pink": (222, 198, 200),
    "dark blue": (58, 68, 92),
    "dark green": (58, 78, 68),
    "dark red": (92, 58, 62),
}


@dataclass(frozen=True)
class SceneConfig:
    """How scenes look. Lengths in pixels, ranges inclusive.

    long_side: the canvas' longer side
    short_side: smallest shorter side; it is drawn between this and `long_side`
    square_fraction: part of the scenes whose sides are equal
    object_size: range of an object's long side
    num_objects: range of the number of objects
    repeat_fraction: part of the scenes in which one name appears twice or three times
    max_hidden: largest part of an object's visible pixels that later objects may cover
    gradient_fraction: part of the scenes (without photographs) whose background is a gradient
    expressions_per_object: most referring expressions drawn for an object of a training scene; evaluations have one
    """

    long_side: int = 80
    short_side: int = 60
    square_fraction: float = 0.5
    object_size: tuple[int, int] = (24, 36)
    num_objects: tuple[int, int] = (2, 6)
    repeat_fraction: float = 0.5
    max_hidden: float = 0.2
    gradient_fraction: float = 0.5
    expressions_per_object: int = 3

    def __post_init__(self):
        if not 0 < self.short_side <= self.long_side:
            raise DataError(f"short_side {self.short_side} is not within 1 to long_side {self.long_side}; change one")
        for key in ("object_size", "num_objects"):
            low, high = getattr(self, key)
            if not 0 < low <= high:
                raise DataError(f"{key} {low} to {high} is not a range of positive numbers; put the smaller one first")
        if self.object_size[1] > self.short_side:
            raise DataError(
                f"object_size up to {self.object_size[1]} does not fit short_side {self.short_side}; "
                "make objects smaller or the canvas larger"
            )
        for key in ("square_fraction", "repeat_fraction", "max_hidden", "gradient_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise DataError(f"{key} is {getattr(self, key)}; it is a fraction, give 0 to 1")
        if self.expressions_per_object < 1:
            raise DataError(f"expressions_per_object is {self.expressions_per_object}; give at least 1")


@dataclass(frozen=True)
class SceneObject(NamedBox):
    """An object of a scene: its name, its whole box before occlusion (xyxy pixels), phrases true of it, of which the first
    is the name, and which pixels of the box are its own, (h, w) bool."""

    phrases: tuple[str, ...] = ()
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)

    def on_canvas(self, width: int, height: int) -> np.ndarray:
        """(height, width) bool: its pixels in the picture, those that later objects cover included."""
        mask_HW = np.zeros((height, width), bool)
        left, top, right, bottom = map(int, self.box)
        mask_HW[top:bottom, left:right] = self.mask
        return mask_HW


@dataclass(frozen=True)
class Scene:
    """image: RGB; objects from back to front; expressions: (object index, text with article, kind), see
    `encoder.data.expressions`."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    caption: str
    expressions: list[tuple[int, str, str]]


@dataclass
class PictureLibrary:
    """Pictures by name, and photographs for backgrounds (none: plain colours and gradients). Keeps resized copies."""

    pictures: Sequence[Picture]
    backgrounds: Sequence[Image.Image] = ()
    by_name: dict[str, list[Picture]] = field(init=False)

    def __post_init__(self):
        self.by_name = {}
        for picture in self.pictures:
            self.by_name.setdefault(picture.name, []).append(picture)
        self.names = sorted(self.by_name)
        self.resized = lru_cache(maxsize=4096)(self._resized)

    def _resized(self, name: str, variant: int, size: int) -> tuple[Image.Image, np.ndarray]:
        """The picture with a long side of `size` visible pixels or one less: RGBA, and its visible mask (h, w) bool.
        The image is exactly as large as what its alpha channel shows."""
        image = self.by_name[name][variant].image
        scale = size / max(image.size)
        shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(shape, Image.Resampling.LANCZOS)
        alpha = image.getchannel("A").point(lambda value: 255 if value >= VISIBLE_ALPHA else 0)
        box = alpha.getbbox()
        if box is None:
            raise DataError(f"picture '{name}' has nothing visible left at {size} px; remove it or draw larger objects")
        return image.crop(box), np.asarray(alpha.crop(box)) > 0


def draw_scene(config: SceneConfig, library: PictureLibrary, seed: int, index: int, split: str = "train") -> Scene:
    """The scene number `index` of `split` under `seed`. Raises DataError where the objects do not fit the canvas."""
    rng = Random(f"{seed}/{split}/{index}")
    names = _draw_names(config, library, rng)
    for _ in range(MAX_ATTEMPTS):
        # What does not fit is drawn again whole, so that the sizes of a scene's objects stay independent.
        width, height = _draw_canvas(config, rng)
        placed = _place(config, library, names, width, height, rng)
        if placed is not None:
            break
    else:
        raise DataError(
            f"{len(names)} objects of {config.object_size[0]} to {config.object_size[1]} px did not fit "
            f"{config.long_side} px in {MAX_ATTEMPTS} attempts; draw fewer or smaller objects"
        )
    image, background = _draw_background(config, library, width, height, rng)
    objects = []
    for name, cut_out, mask, left, top in placed:
        image.paste(cut_out, (left, top), cut_out)
        box = (float(left), float(top), float(left + mask.shape[1]), float(top + mask.shape[0]))
        objects.append(SceneObject(name, box, _phrases(config, name, max(mask.shape)), mask))
    expressions = refer(objects, width, height, rng, config.expressions_per_object)
    return Scene(image, tuple(objects), caption(names, background), expressions)


def _draw_names(config: SceneConfig, library: PictureLibrary, rng: Random) -> list[str]:
    count = rng.randint(*config.num_objects)
    repeats = 1
    if count >= 2 and rng.random() < config.repeat_fraction:
        repeats = 3 if count >= 4 and rng.random() < 0.3 else 2
    distinct = count - repeats + 1
    if distinct > len(library.names):
        raise DataError(
            f"a scene of {count} objects wants {distinct} names, the pictures have {len(library.names)}; "
            "give more pictures or draw fewer objects"
        )
    chosen = rng.sample(library.names, distinct)
    names = chosen + [chosen[0]] * (repeats - 1)
    rng.shuffle(names)
    return names


def _draw_canvas(config: SceneConfig, rng: Random) -> tuple[int, int]:
    """Width and height."""
    if config.short_side == config.long_side or rng.random() < config.square_fraction:
        return config.long_side, config.long_side
    sides = config.long_side, rng.randint(config.short_side, config.long_side - 1)
    return sides if rng.random() < 0.5 else sides[::-1]


def _place(
    config: SceneConfig, library: PictureLibrary, names: list[str], width: int, height: int, rng: Random
) -> list[tuple[str, Image.Image, np.ndarray, int, int]] | None:
    """Sizes and positions for the names, from back to front: (name, cut-out, mask, left, top), or None if an object
    found no place where it hides no more than `max_hidden` of any other."""
    owner = np.full((height, width), -1, np.int8)  # (height, width): index of the object seen at each pixel
    budgets: list[int] = []  # visible pixels that each object may still lose
    boxes: list[Box] = []
    placed = []
    for index, name in enumerate(names):
        variant = rng.randrange(len(library.by_name[name]))
        cut_out, mask = library.resized(name, variant, rng.randint(*config.object_size))
        mask_height, mask_width = mask.shape
        best = None
        for _ in range(POSITIONS_TRIED):
            left, top = rng.randint(0, width - mask_width), rng.randint(0, height - mask_height)
            box = (left, top, left + mask_width, top + mask_height)
            overlap = sum(_overlap(box, other) for other in boxes)
            if best is None or overlap < best[0]:
                best = (overlap, box)
            if overlap <= FREE_OVERLAP * mask_width * mask_height:
                break
        box = best[1]
        left, top = box[:2]
        under = owner[top : top + mask_height, left : left + mask_width]
        covered = [
            (other, int(np.count_nonzero(mask & (under == other)))) for other in range(index) if _overlap(box, boxes[other]) > 0
        ]
        if any(lost > budgets[other] for other, lost in covered):
            return None
        for other, lost in covered:
            budgets[other] -= lost
        under[mask] = index
        budgets.append(int(config.max_hidden * np.count_nonzero(mask)))
        boxes.append(box)
        placed.append((name, cut_out, mask, left, top))
    return placed


def _overlap(box: Box, other: Box) -> float:
    across = min(box[2], other[2]) - max(box[0], other[0])
    down = min(box[3], other[3]) - max(box[1], other[1])
    return across * down if across > 0 and down > 0 else 0


def _phrases(config: SceneConfig, name: str, side: int) -> tuple[str, ...]:
    """The name, and "small <name>" or "large <name>" in the lowest and highest quarter of the sizes drawn, if these
    quarters differ by a fifth or more."""
    low, high = config.object_size
    quarter = (high - low) / 4
    if high - quarter >= 1.2 * (low + quarter):
        if side <= low + quarter:
            return name, f"small {name}"
        if side >= high - quarter:
            return name, f"large {name}"
    return (name,)


def _draw_background(
    config: SceneConfig, library: PictureLibrary, width: int, height: int, rng: Random
) -> tuple[Image.Image, str | None]:
    """An RGB image, and its colours in words (None for a photograph)."""
    if library.backgrounds:
        photo = rng.choice(library.backgrounds)
        scale = max(width / photo.width, height / photo.height) * rng.uniform(1, 1.5)
        crop_width, crop_height = min(width / scale, photo.width), min(height / scale, photo.height)
        left, top = rng.uniform(0, photo.width - crop_width), rng.uniform(0, photo.height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        return photo.resize((width, height), Image.Resampling.BILINEAR, box=box), None
    first, second = rng.sample(sorted(BACKGROUND_COLOURS), 2)
    start, end = ([value + rng.randint(-8, 8) for value in BACKGROUND_COLOURS[key]] for key in (first, second))
    if rng.random() >= config.gradient_fraction:
        return Image.new("RGB", (width, height), tuple(start)), first
    across, down = rng.choice([(1, 0), (0, 1), (1, 1)])
    blend = (across * np.linspace(0, 1, width) + down * np.linspace(0, 1, height)[:, None]) / (across + down)
    pixels = np.asarray(start) + blend[..., None] * (np.asarray(end) - np.asarray(start))  # (height, width, 3)
    return Image.fromarray(pixels.round().astype(np.uint8)), f"{first} and {second}"


IRREGULAR_PLURALS = {
    "fish": "fish",
    "sheep": "sheep",
    "octopus": "octopuses",
    "leaf": "leaves",
    "knife": "knives",
    "wolf": "wolves",
    "mouse": "mice",
    "tomato": "tomatoes",
    "potato": "potatoes",
}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def plural(name: str) -> str:
    """'red apple' -> 'red apples'; English, by the last word."""
    *head, last = name.split(" ")
    if last in IRREGULAR_PLURALS:
        last = IRREGULAR_PLURALS[last]
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s"
    return " ".join([*head, last])


def with_article(name: str) -> str:
    """'umbrella' -> 'an umbrella'."""
    vowel = name[:1].lower() in "aeiou" and not name.lower().startswith(("uni", "eu", "one ", "use"))
    return f"{'an' if vowel else 'a'} {name}"


def caption(names: Sequence[str], background: str | None) -> str:
    """'a bus, two red apples and a green heart on a pale blue background'; each name once, in order of appearance."""
    counted = [
        with_article(name) if count == 1 else f"{NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else count} {plural(name)}"
        for name, count in Counter(names).items()
    ]
    text = counted[0] if len(counted) == 1 else f"{', '.join(counted[:-1])} and {counted[-1]}"
    return text if background is None else f"{text} on {with_article(background)} background"


@dataclass(frozen=True)
class DrawnScene:
    """A scene as it goes to files: `name` is `<split>/<id>`, `png` the file's bytes."""

    name: str
    png: bytes
    scene: Scene

    @property
    def size(self) -> tuple[int, int]:
        return self.scene.image.size
