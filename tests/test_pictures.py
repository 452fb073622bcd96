"""The picture library: names, cut-outs, splits, and what it says to folders it cannot use."""

import numpy as np
import pytest
from PIL import Image

from encoder.data.pictures import (
    BASE_SEEN,
    BASE_UNSEEN,
    LISTS,
    NEW,
    NEW_UNSEEN,
    caption_name,
    folder_pictures,
    load_library,
    photographs,
    split_names,
    twemoji_pictures,
)
from encoder.errors import DataError


def write_cut_out(path, colour=(200, 30, 30), box=(10, 5, 30, 25), size=(40, 40)):
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste((*colour, 255), box)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_no_name_is_in_two_lists_or_ends_another():
    lists = [BASE_SEEN, BASE_UNSEEN, NEW, NEW_UNSEEN]
    names = [name for one in lists for name in one]
    assert len(names) == len(set(names))
    for name in names:
        assert 1 <= len(name.split()) <= 2
        assert not any(other != name and f" {name} " in f" {other} " for other in names)


def test_unseen_combinations_are_made_of_seen_words():
    seen_words = {word for name in BASE_SEEN for word in name.split()}
    combinations = [name for name in BASE_UNSEEN if len(name.split()) == 2 and name != "tennis ball"]
    assert len(combinations) >= 6
    assert all(set(name.split()) <= seen_words for name in combinations)


@pytest.mark.parametrize("pictures", sorted(LISTS))
def test_built_in_pictures_are_cropped_to_their_alpha(pictures):
    seen, unseen = load_library(pictures, seed=0)
    assert [item.name for item in seen + unseen] == [*LISTS[pictures][0], *LISTS[pictures][1]]
    for picture in seen + unseen:
        visible = np.asarray(picture.image.getchannel("A")) >= 128
        assert picture.image.mode == "RGBA" and min(picture.image.size) >= 16
        assert visible[0].any() and visible[-1].any() and visible[:, 0].any() and visible[:, -1].any()


def test_unknown_emoji_is_named():
    with pytest.raises(DataError, match="no 'no such thing'"):
        twemoji_pictures({"thing": "no such thing"})


@pytest.mark.parametrize(
    "caption, name",
    [
        ("An emperor tamarin.\nes: ...", "emperor tamarin"),
        ("The Moon", "moon"),
        ("a red apple.", "red apple"),
        ("Theatre", "theatre"),
        ("", ""),
    ],
)
def test_caption_name(caption, name):
    assert caption_name(caption) == name


def test_folder_names_and_boxes(tmp_path):
    write_cut_out(tmp_path / "animals" / "tamarin.png")
    (tmp_path / "animals" / "tamarin.txt").write_text("An emperor tamarin.\nother lines")
    write_cut_out(tmp_path / "big_red-box.png", box=(0, 0, 10, 20))
    pictures = folder_pictures(tmp_path)
    assert [(item.name, item.image.size) for item in pictures] == [("emperor tamarin", (20, 20)), ("big red box", (10, 20))]


def test_palette_transparency_is_kept(tmp_path):
    write_cut_out(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").quantize(8).save(tmp_path / "b.png")
    (tmp_path / "a.png").unlink()
    (picture,) = folder_pictures(tmp_path)
    assert picture.image.mode == "RGBA" and picture.image.size == (20, 20)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="not there"):
        folder_pictures(tmp_path / "missing")
    with pytest.raises(DataError, match="holds no"):
        folder_pictures(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "opaque.png")
    with pytest.raises(DataError, match="opaque.png has mode RGB"):
        folder_pictures(tmp_path)
    Image.new("RGBA", (8, 8)).save(tmp_path / "opaque.png")
    with pytest.raises(DataError, match="no visible pixel"):
        folder_pictures(tmp_path)
    (tmp_path / "opaque.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(DataError, match="opaque.png cannot be read"):
        folder_pictures(tmp_path)


def test_names_split_by_seed():
    names = [f"name {index}" for index in range(40)]
    seen, unseen = split_names(names, seed=1)
    assert len(unseen) == 8 and not set(seen) & set(unseen) and set(seen) | set(unseen) == set(names)
    assert split_names(reversed(names), seed=1) == (seen, unseen)
    assert split_names(names, seed=2) != (seen, unseen)
    with pytest.raises(DataError, match="at least 2"):
        split_names(["one", "one"], seed=0)


def test_photographs(tmp_path):
    Image.new("RGB", (1024, 300), "blue").save(tmp_path / "a.jpg")
    (photo,) = photographs(tmp_path)
    assert photo.mode == "RGB" and max(photo.size) <= 512
    (tmp_path / "b.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="b.jpg cannot be read"):
        photographs(tmp_path)
