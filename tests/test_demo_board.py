"""The board of the demo: pictures that come in, marks in their pixels, and what is drawn of them."""

import numpy as np
import pytest
from demo_fixtures import grey_chat, rgb
from PIL import Image

from demo.board import MAX_DRAWN, MAX_QUESTION, Board, Mark
from demo.drawing import COLOURS, colour, draw_marks
from demo.pictures import KEPT_SIDE, MAX_BYTES, data_url, draw_examples, open_picture
from demo.session import conversation
from demo.words import board_value
from encoder.errors import DataError
from encoder.masks import decode_mask


@pytest.fixture()
def session():
    return grey_chat()


@pytest.fixture()
def board(session):
    return session.board


def saved(folder, image: Image.Image, name: str = "picture.png", **options):
    image.save(folder / name, **options)
    return folder / name


# --- drawing


def test_a_box_lies_on_its_pixels_in_its_colour():
    image = Image.new("RGB", (80, 40), (120, 120, 120))
    boxes = [(10, 10, 30, 35), (50, 5, 70, 30)]
    shown = np.asarray(draw_marks(image, [Mark(number, "box", box) for number, box in enumerate(boxes, 1)]))
    assert shown.shape == (320, 640, 3) and np.unique(np.asarray(image)).tolist() == [120]
    for number, (x1, y1, x2, y2) in {1: (80, 80, 240, 280), 2: (400, 40, 560, 240)}.items():
        expected, x, y = rgb(colour(number)), (x1 + x2) // 2, (y1 + y2) // 2
        for row, column in ((y, x1), (y, x2 - 1), (y1, x), (y2 - 1, x)):
            assert tuple(shown[row, column]) == expected
        assert tuple(shown[y, x]) == (120, 120, 120) and tuple(shown[y, x1 - 3]) == (120, 120, 120)
        rows, columns = np.nonzero((shown == expected).all(-1) & (np.arange(320) >= y1)[:, None])
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (y1, y2 - 1, x1, x2 - 1)  # nowhere else
        label = shown[y1 - 12 : y1 - 2, x1 : x1 + 12].reshape(-1, 3)  # the number stands above its box
        assert expected in set(map(tuple, label))


def test_a_point_and_a_scribble_are_drawn_where_they_are(board):
    board.draw("point", [(20, 20)])
    board.draw("scribble", [(50, 30), (70, 30)])
    shown = np.asarray(draw_marks(board.picture, board.marks.values()))
    assert tuple(shown[160, 160]) == rgb(colour(1)) and tuple(shown[160, 200]) == (120, 120, 120)
    assert all(tuple(shown[240, x]) == rgb(colour(2)) for x in (402, 480, 558)) and tuple(shown[200, 480]) == (120, 120, 120)


@pytest.mark.parametrize("size", [(1, 1), (2000, 1), (1, 2000), (640, 480), (1536, 1000)])
def test_any_picture_and_any_box_can_be_drawn(size):
    width, height = size
    boxes = [(0, 0, width, height), (-9, -9, width + 9, height + 9), (width, height, width, height), (0, 0, 0.1, 0.1)]
    shown = draw_marks(Image.new("L", size), [Mark(333 * number, "answer", box) for number, box in enumerate(boxes)])
    assert shown.mode == "RGB" and max(shown.size) >= 640 and draw_marks(Image.new("RGB", size), []).size == shown.size


def test_white_numbers_can_be_read_on_every_colour():
    for value in COLOURS:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb(value))]
        luminance = float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
        assert 1.05 / (luminance + 0.05) >= 4.5
    assert colour(1) == colour(1 + len(COLOURS)) and len(set(COLOURS)) == len(COLOURS)


def test_examples_are_small_scenes_with_a_question_and_labels_each():
    examples = draw_examples()
    assert len(examples) == 4 and all(example.image.mode == "RGB" for example in examples)
    for example in examples:
        assert example.question.startswith("Where is the ") and 5 <= len(example.labels) == len(set(example.labels))
        assert any(label in example.question for label in example.labels)
    assert examples[0].image.tobytes() == draw_examples()[0].image.tobytes()


# --- uploads


def test_an_upload_is_seen_as_viewers_show_it(tmp_path):
    turned = Image.new("RGB", (30, 20), (200, 0, 0))
    exif = turned.getexif()
    exif[274] = 6  # a phone held upright
    assert open_picture(saved(tmp_path, turned, "turned.jpg", exif=exif))[0].size == (20, 30)
    clear, _ = open_picture(saved(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 0))))
    assert clear.mode == "RGB" and clear.getpixel((3, 3)) == (255, 255, 255)
    assert open_picture(saved(tmp_path, Image.new("CMYK", (8, 8)), "print.jpg"))[0].mode == "RGB"
    assert open_picture(saved(tmp_path, Image.new("P", (8, 8)), "few.gif"))[0].mode == "RGB"


def test_a_large_picture_is_reduced_and_records_stay_in_its_own_pixels(tmp_path, session):
    for name in ("large.png", "large.jpg"):  # a JPEG is already decoded smaller
        session.put(str(saved(tmp_path, Image.new("L", (4 * KEPT_SIDE, 400)), name)))
        assert session.board.picture.size == (KEPT_SIDE, 100) and session.board.scale == 4
        session.draw("", "box", [(10, 20), (110, 70)])
        record = conversation(session)
        assert record["picture"] == {"width": 4 * KEPT_SIDE, "height": 400} and record["marks"][0]["box"] == [40, 80, 440, 280]


@pytest.mark.parametrize(
    "kind", ["nothing", "words", "truncated", "svg", "postscript", "64 megapixels", "220 megapixels", "megabytes", "missing"]
)
def test_what_is_no_picture_gets_one_sentence_and_the_chat_goes_on(kind, tmp_path, session):
    file = tmp_path / f"{kind}.png"
    if kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:3000])
    elif kind.endswith("megapixels"):
        Image.new("1", (8000, 8000) if kind.startswith("64") else (20000, 11000)).save(file)
    elif kind == "megabytes":
        with file.open("wb") as sparse:
            sparse.truncate(MAX_BYTES + 1)
    elif kind != "missing":
        svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
        file.write_bytes({"nothing": b"", "words": b"no picture", "svg": svg, "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n"}[kind])
    board = session.board
    session.put(str(file))
    assert session.board is board
    expected = next((word for word in ("megapixels", "megabytes") if word in kind), "cannot be read")
    assert expected in session.status and session.status.endswith(".") and str(tmp_path) not in session.status
    session.put(str(saved(tmp_path, Image.new("RGB", (9, 7)), "good.png")))
    assert session.board.picture.size == (9, 7)


# --- marks


def test_marks_are_in_the_pictures_pixels_however_they_were_drawn(session):
    session.draw("", "box", [(70, 5), (50, 30)])
    assert session.board.marks[1].box == (50, 5, 70, 30) and session.question == "What is [1]?"
    session.draw("my own words", "box", [(-50, -50), (9999, 9999)])
    assert session.board.marks[2].box == (0, 0, 80, 40) and session.question == "my own words"
    session.draw("", "point", [(4, 20)])  # its square reaches 0.15 of 80 px, and is cut at the border
    assert session.board.marks[3].box == (0, 8, 16, 32) and session.board.marks[3].points == ((4, 20),)
    session.draw("", "scribble", [(20, 20), (40, 20), (40, 30)])
    assert session.board.marks[4].box == pytest.approx((18.4, 18.4, 41.6, 31.6))
    assert session.board.shown == session.board.drawn == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("kind", "points", "said"),
    [
        ("box", [(10, 10), (10, 30)], "no area"),
        ("box", [(10, 10), (10.5, 30)], "no area"),
        ("box", [(100, 10), (120, 30)], "no area"),  # beside the picture
        ("box", [(10, 10)], "points"),
        ("point", [], "points"),
        ("point", [(float("nan"), 3)], "finite"),
        ("scribble", [(1, 1)] * 1001, "points"),
        ("scribble", [1, 2], "pairs"),
        ("scribble", None, "pairs"),
        ("circle", [(1, 1)], "'circle'"),
        (None, None, "'None'"),
    ],
)
def test_a_mark_that_is_none_gets_one_sentence(kind, points, said, session):
    session.draw("q", kind, points)
    assert session.board.marks == {} and said in session.status and session.status.endswith(".") and session.question == "q"


def test_a_scribble_has_the_mask_of_its_line_for_models_that_pool_under_it(board):
    board.draw("scribble", [(20, 20), (40, 20)])
    assert board.region(1).mask is None and board.region(1).box == board.marks[1].box
    mask = decode_mask(board.region(1, outlined=True).mask)
    assert mask.shape == (40, 80) and mask[20, 20:41].all() and not mask[:17].any() and not mask[24:].any()
    assert not mask[:, :17].any() and not mask[:, 44:].any()
    board.draw("scribble", [(0, 0), (0, 39)])  # the first run of an encoding counts what is not covered
    edge = decode_mask(board.region(2, outlined=True).mask)
    assert edge[:, 0].all() and not edge[:, 4:].any()


def test_a_point_goes_to_the_model_as_its_square_or_as_itself():
    board = Board(Image.new("RGB", (80, 40)))
    board.draw("point", [(40, 20)])
    assert board.region(1).point is None and board.region(1).box == (28, 8, 52, 32)
    board = Board(Image.new("RGB", (80, 40)), point_reach=0)
    board.draw("point", [(40, 20)])
    assert board.region(1).point == (40, 20) and board.region(1).box == (36, 16, 44, 24)


def test_undo_takes_back_the_last_mark_and_numbers_are_not_given_twice(session):
    session.draw("", "box", [(0, 0), (10, 10)])
    session.draw("", "point", [(20, 20)])
    session.undo_mark("q")
    assert list(session.board.marks) == [1] and session.question == "q" and "[2] is gone" in session.status
    session.undo_mark("What is [2]?")
    assert session.board.marks == {} and session.board.shown == [] and session.question == ""
    session.undo_mark("")
    assert "no mark" in session.status
    session.draw("", "box", [(0, 0), (10, 10)])
    assert list(session.board.marks) == [3]


def test_marks_are_bounded_and_no_picture_takes_none(session):
    for _ in range(MAX_DRAWN + 1):
        session.draw("", "box", [(0, 0), (10, 10)])
    assert len(session.board.marks) == MAX_DRAWN and str(MAX_DRAWN) in session.status
    session.start()
    session.draw("", "point", [(5, 5)])
    assert "no picture" in session.status and board_value(session.board, ["a"]) is None and not session.board.marks


def test_a_question_names_marks(board):
    board.draw("box", [(10, 5), (30, 25)])
    board.draw("box", [(40, 5), (60, 25)])
    text = "Is <region:0> left of <region:1>, or <region:0> right?"
    assert board.read("Is [2] left of [1], or [2] right?") == (text, [2, 1])
    with pytest.raises(DataError, match=str(MAX_QUESTION + 1)):
        board.read("x" * (MAX_QUESTION + 1))


def test_the_page_gets_the_picture_and_each_models_own_boxes(board):
    board.draw("box", [(10, 5), (30, 25)])
    board.answer((1, 2, 3, 4), "a bus", "left")
    board.answer((5, 6, 7, 8), "a key", "right")
    board.show([3])
    value = board_value(board, ["left", "right"])
    assert (value["width"], value["height"]) == (80, 40) and value["picture"] == data_url(board.picture)
    left, right = value["panes"]
    assert [mark["number"] for mark in left["marks"]] == [1, 2] and [mark["number"] for mark in right["marks"]] == [1, 3]
    assert [mark["shown"] for mark in left["marks"]] == [True, False] and right["marks"][1]["box"] == [5, 6, 7, 8]
    assert (left["title"], right["marks"][1]["title"], right["marks"][1]["colour"]) == ("left", "a key", colour(3))
