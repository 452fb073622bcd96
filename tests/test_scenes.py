"""Scenes: boxes are where the pixels are, layouts keep their bounds, captions are true, draws are reproducible."""

import numpy as np
import pytest
from PIL import Image

from encoder.data import scenes as scenes_module
from encoder.data.pictures import Picture, load_library
from encoder.data.scenes import PictureLibrary, SceneConfig, caption, draw_scene, plural, with_article
from encoder.errors import DataError


@pytest.fixture(scope="module")
def library():
    return PictureLibrary(load_library("base", 0)[0])


def solid(name, colour, size=(64, 64)):
    return Picture(name, Image.new("RGBA", size, (*colour, 255)))


# Colours no background comes near, so that pixels tell which object they belong to.
PAINTS = {"red tile": (255, 0, 0), "lime tile": (0, 255, 0), "blue tile": (0, 0, 255), "cyan tile": (0, 255, 255)}


def test_boxes_and_occlusion_from_pixels_alone():
    painted = PictureLibrary([solid(name, colour, (64, 40)) for name, colour in PAINTS.items()])
    config = SceneConfig(num_objects=(2, 4), repeat_fraction=0, max_hidden=0.2)
    hidden_somewhere = 0
    for index in range(80):
        scene = draw_scene(config, painted, 5, index)
        pixels = np.asarray(scene.image)
        for item in scene.objects:
            left, top, right, bottom = map(int, item.box)
            mine = (pixels == PAINTS[item.name]).all(-1)
            ys, xs = np.nonzero(mine)
            assert left <= xs.min() and xs.max() < right and top <= ys.min() and ys.max() < bottom
            assert item.box == (left, top, right, bottom) and 0 <= left and right <= scene.image.width
            area = (right - left) * (bottom - top)
            assert mine.sum() >= 0.8 * area - 1
            if mine.sum() == area:  # nothing hidden: the box is exactly the pixels' extent
                assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == item.box
            else:
                hidden_somewhere += 1
    assert hidden_somewhere > 5


def test_every_object_of_real_pictures_keeps_its_pixels(library):
    """Repasted one by one over white: each box is the extent of the alpha it pasted."""
    for name in library.names:
        cut_out, mask = library.resized(name, 0, 24)
        assert mask.shape == cut_out.size[::-1] and 22 <= max(mask.shape) <= 24
        assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()


def test_same_scene_from_seed_split_and_index_alone(library):
    config = SceneConfig()
    first = draw_scene(config, library, 3, 17, "val")
    for other in range(5):
        draw_scene(config, library, 3, other, "train")
    again = draw_scene(config, PictureLibrary(load_library("base", 0)[0]), 3, 17, "val")
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.objects, first.caption, first.expressions) == (again.objects, again.caption, again.expressions)
    for seed, index, split in ((4, 17, "val"), (3, 18, "val"), (3, 17, "train")):
        assert draw_scene(config, library, seed, index, split).image.tobytes() != first.image.tobytes()


def test_statistics_of_the_default(library):
    drawn = [draw_scene(SceneConfig(), library, 1, index) for index in range(400)]
    sizes = [scene.image.size for scene in drawn]
    assert all(max(size) == 80 and min(size) >= 60 for size in sizes)
    assert 0.4 < np.mean([width == height for width, height in sizes]) < 0.7
    assert any(width > height for width, height in sizes) and any(width < height for width, height in sizes)
    assert {len(scene.objects) for scene in drawn} == {2, 3, 4, 5, 6}
    assert 0.4 < np.mean([len({item.name for item in scene.objects}) < len(scene.objects) for scene in drawn]) < 0.6
    assert all(22 <= item.side <= 36 for scene in drawn for item in scene.objects)
    without = sum(len(scene.objects) - len({index for index, _, _ in scene.expressions}) for scene in drawn)
    assert without < 0.03 * sum(len(scene.objects) for scene in drawn)


def test_phrases_are_true(library):
    seen = set()
    for index in range(100):
        for item in draw_scene(SceneConfig(), library, 2, index).objects:
            assert item.phrases[0] == item.name
            for phrase in item.phrases[1:]:
                seen.add(phrase.split()[0])
                assert phrase in (f"small {item.name}", f"large {item.name}")
                assert item.side <= 27 if phrase.startswith("small") else item.side >= 33
    assert seen == {"small", "large"}


def test_captions():
    assert caption(["bus", "red apple", "red apple"], "pale blue") == "a bus and two red apples on a pale blue background"
    assert caption(["umbrella"], None) == "an umbrella"
    text = caption(["bus", "owl", "bus", "bus", "key"], "orange and red")
    assert text == "three buses, an owl and a key on an orange and red background"


@pytest.mark.parametrize(
    "name, many",
    [
        ("fish", "fish"),
        ("cherry", "cherries"),
        ("monkey", "monkeys"),
        ("red box", "red boxes"),
        ("knife", "knives"),
        ("bus", "buses"),
    ],
)
def test_plural(name, many):
    assert plural(name) == many


@pytest.mark.parametrize("name", ["an owl", "a unicorn", "a euro", "an orange book", "a bus"])
def test_article(name):
    assert with_article(name.split(" ", 1)[1]) == name


def test_backgrounds_from_photographs(library):
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 255, (40, 200, 3), dtype=np.uint8))]
    scene = draw_scene(SceneConfig(), PictureLibrary(library.pictures, photos), 0, 0)
    assert "background" not in scene.caption
    assert len(np.unique(np.asarray(scene.image).reshape(-1, 3), axis=0)) > 500


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"short_side": 90}, "short_side 90"),
        ({"object_size": (36, 24)}, "object_size 36 to 24"),
        ({"object_size": (24, 70)}, "does not fit"),
        ({"num_objects": (0, 3)}, "num_objects"),
        ({"max_hidden": 1.5}, "max_hidden is 1.5"),
        ({"expressions_per_object": 0}, "expressions_per_object"),
    ],
)
def test_contradictions_are_rejected(fields, message):
    with pytest.raises(DataError, match=message):
        SceneConfig(**fields)


def test_too_few_names_and_too_little_room(monkeypatch):
    few = PictureLibrary([solid("red tile", (255, 0, 0)), solid("blue tile", (0, 0, 255))])
    with pytest.raises(DataError, match="the pictures have 2"):
        draw_scene(SceneConfig(num_objects=(6, 6), repeat_fraction=0), few, 0, 0)
    monkeypatch.setattr(scenes_module, "MAX_ATTEMPTS", 5)
    four = PictureLibrary([solid(name, colour) for name, colour in PAINTS.items()])
    crowded = SceneConfig(long_side=40, short_side=40, object_size=(30, 36), num_objects=(4, 4), repeat_fraction=0)
    with pytest.raises(DataError, match="did not fit"):
        draw_scene(crowded, four, 0, 0)
