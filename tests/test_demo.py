"""The chat's picture: clicks become boxes in pixels of the original, and what is drawn lies where the box lies."""

import numpy as np
import pytest
from PIL import Image

from demo.drawing import Board, colour, coloured_names, draw_boxes, draw_examples, open_picture, shown_scale
from encoder.errors import DataError


def test_two_clicks_on_the_enlarged_picture_are_a_box_in_its_own_pixels():
    board = Board(Image.new("RGB", (80, 64), "grey"))
    scale = shown_scale(board.picture.size)
    assert scale == 8
    assert "opposite corner" in board.click(60 * scale, 40 * scale)
    assert "[1]" in board.click(20 * scale, 10 * scale)  # the corners may come in any order
    assert board.boxes == {1: (20, 10, 60, 40)}
    board.click(-50, -50)
    board.click(10_000, 10_000)  # beyond the picture: its edge
    assert board.boxes[2] == (0, 0, 80, 64)
    assert "[2]" in board.undo() and list(board.boxes) == [1]


def test_a_box_without_area_and_a_click_without_a_picture_are_a_sentence():
    board = Board(Image.new("RGB", (80, 64)))
    board.click(100, 100)
    assert "enclose nothing" in board.click(102, 300)
    assert not board.boxes and board.corner is None
    assert "no picture" in Board().click(1, 1)


def test_boxes_named_in_a_question_become_regions_in_the_order_of_their_naming():
    board = Board(Image.new("RGB", (80, 64)))
    board.add((0, 0, 10, 10)), board.add((10, 10, 20, 20))
    assert board.read("Is [2] left of [1], or [2] of it?") == ("Is <region:0> left of <region:1>, or <region:0> of it?", [2, 1])
    with pytest.raises(DataError, match=r"no box \[3\]"):
        board.read("What is [3]?")


def test_the_drawn_outline_lies_on_the_box_and_the_picture_stays():
    image = Image.new("RGB", (80, 64), "black")
    drawn = np.asarray(draw_boxes(image, {1: (20, 16, 60, 48)}))
    assert drawn.shape == (512, 640, 3) and not np.asarray(image).any()
    red = tuple(int(colour(1)[i : i + 2], 16) for i in (1, 3, 5))
    rows, columns = np.nonzero((drawn == red).all(-1))
    assert (columns.min(), columns.max()) == (160, 479)
    assert rows.max() == 383
    assert not drawn[200:300, 250:400].any()  # nothing inside


def test_uploads_are_turned_to_rgb_or_refused_in_a_sentence_without_their_path(tmp_path):
    Image.new("RGBA", (3000, 10), (255, 0, 0, 0)).save(tmp_path / "long.png")
    picture = open_picture(tmp_path / "long.png")
    assert picture.mode == "RGB" and max(picture.size) == 1536 and picture.getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    for name in ("empty.png", "text.png"):
        with pytest.raises(DataError, match="cannot be read as a picture") as error:
            open_picture(tmp_path / name)
        assert str(tmp_path) not in str(error.value)
    Image.new("1", (10_000, 6_000)).save(tmp_path / "huge.png")
    with pytest.raises(DataError, match="megapixels"):
        open_picture(tmp_path / "huge.png")


def test_words_of_a_visitor_are_escaped_and_box_numbers_coloured():
    text = coloured_names("<b>what</b> is [1]?")
    assert "<b>" not in text and "&lt;b&gt;" in text and colour(1) in text


def test_examples_are_the_same_each_time_and_come_with_a_question():
    first, second = draw_examples(), draw_examples()
    assert len(first) == 4 and all(question.startswith("Where is the ") for _, question in first)
    assert [question for _, question in first] == [question for _, question in second]
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
