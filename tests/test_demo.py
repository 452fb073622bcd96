"""The chat of the demo without a browser: its pictures, boxes, questions and answers on a tiny real model, and its server."""

import importlib.util
import io
import json
import random
import socket
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from PIL import Image

from demo.app import Session, ask, build_page, hear, load, serve
from demo.drawing import (
    COLOURS,
    KEPT_SIDE,
    MAX_CLICKED,
    MAX_QUESTION,
    colour,
    coloured_names,
    draw_boxes,
    draw_examples,
    open_picture,
)
from encoder.errors import DataError
from mllm.box_text import BoxCodec
from mllm.checkpoint import save_mllm
from mllm.config import MllmConfig
from mllm.generation import GroundingModel
from mllm.model import build_mllm


def rgb(hexadecimal: str) -> tuple[int, int, int]:
    return tuple(int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> GroundingModel:
    """An MLLM with random weights: what it says is noise, how it is asked is real."""
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 2)
    write_clip(folder / "clip")
    mllm = build_mllm(MllmConfig(**recipe(folder)))
    save_mllm(folder / "mllm", mllm.model, mllm.tokenizer, mllm.settings, torch.float32, None, mllm.sentencepiece_model)
    return load(folder / "mllm")


@pytest.fixture()
def session() -> Session:
    """A chat about a grey picture of 80 x 40 px, which is shown 8 times as large."""
    session = Session()
    session.start(Image.new("RGB", (80, 40), (120, 120, 120)))
    return session


def saved(folder, image: Image.Image, name: str = "picture.png", **options):
    image.save(folder / name, **options)
    return folder / name


# --- drawing


def test_a_box_lies_on_its_pixels_in_its_colour():
    image = Image.new("RGB", (80, 40), (120, 120, 120))
    shown = np.asarray(draw_boxes(image, {1: (10, 10, 30, 35), 2: (50, 5, 70, 30)}))
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


@pytest.mark.parametrize("size", [(1, 1), (2000, 1), (1, 2000), (640, 480), (1536, 1000)])
def test_any_picture_and_any_box_can_be_drawn(size):
    width, height = size
    boxes = {
        1: (0, 0, width, height),
        2: (-9, -9, width + 9, height + 9),
        3: (width, height, width, height),
        999: (0, 0, 0.1, 0.1),
    }
    shown = draw_boxes(Image.new("L", size), boxes, corner=(width, 0))
    assert shown.mode == "RGB" and max(shown.size) >= 640 and draw_boxes(Image.new("RGB", size), {}).size == shown.size


def test_white_numbers_can_be_read_on_every_colour():
    for value in COLOURS:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb(value))]
        luminance = float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
        assert 1.05 / (luminance + 0.05) >= 4.5
    assert colour(1) == colour(1 + len(COLOURS)) and len(set(COLOURS)) == len(COLOURS)


def test_examples_are_small_scenes_with_a_question_each():
    examples = draw_examples()
    assert len(examples) == 4 and all(image.mode == "RGB" and text.startswith("Where is the ") for image, text in examples)
    assert examples[0][0].tobytes() == draw_examples()[0][0].tobytes()


# --- uploads


def test_an_upload_is_seen_as_viewers_show_it(tmp_path):
    turned = Image.new("RGB", (30, 20), (200, 0, 0))
    exif = turned.getexif()
    exif[274] = 6  # a phone held upright
    assert open_picture(saved(tmp_path, turned, "turned.jpg", exif=exif)).size == (20, 30)
    clear = open_picture(saved(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 0))))
    assert clear.mode == "RGB" and clear.getpixel((3, 3)) == (255, 255, 255)
    assert open_picture(saved(tmp_path, Image.new("CMYK", (8, 8)), "print.jpg")).mode == "RGB"
    assert open_picture(saved(tmp_path, Image.new("P", (8, 8)), "few.gif")).mode == "RGB"
    assert open_picture(saved(tmp_path, Image.new("L", (2 * KEPT_SIDE, 10)))).size == (KEPT_SIDE, 5)


@pytest.mark.parametrize(
    "kind", ["nothing", "words", "truncated", "svg", "postscript", "64 megapixels", "220 megapixels", "missing"]
)
def test_what_is_no_picture_gets_one_sentence_and_the_chat_goes_on(kind, tmp_path, session):
    file = tmp_path / f"{kind}.png"
    if kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:3000])
    elif kind.endswith("megapixels"):
        Image.new("1", (8000, 8000) if kind.startswith("64") else (20000, 11000)).save(file)
    elif kind != "missing":
        svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
        file.write_bytes({"nothing": b"", "words": b"no picture", "svg": svg, "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n"}[kind])
    board = session.board
    session.put(str(file))
    assert session.board is board
    assert ("megapixels" if "megapixels" in kind else "cannot be read") in session.status
    assert session.status.endswith(".") and str(tmp_path) not in session.status
    session.put(str(saved(tmp_path, Image.new("RGB", (9, 7)), "good.png")))
    assert session.board.picture.size == (9, 7)


# --- clicks


def test_two_clicks_in_any_order_make_a_box_in_the_pictures_pixels(session):
    session.click("", 560, 40)
    assert session.board.corner == (70, 5) and "opposite" in session.status
    session.click("", 400, 240)
    assert session.board.boxes == {1: (50, 5, 70, 30)} and session.question == "What is [1]?"
    session.click("my own words", -50, -50)
    session.click("my own words", 9999, 9999)
    assert session.board.boxes[2] == (0, 0, 80, 40) and session.question == "my own words"
    assert session.board.drawn().size == (640, 320)


def test_an_empty_box_gets_one_sentence(session):
    for x, y in ((100, 100), (104, 300)):
        session.click("", x, y)
    assert not session.board.boxes and session.board.corner is None and "nothing" in session.status


def test_undo_takes_back_a_corner_then_boxes_and_numbers_are_not_given_twice(session):
    for x, y in ((0, 0), (80, 80), (160, 160)):
        session.click("", x, y)
    session.undo("q")
    assert session.board.corner is None and list(session.board.boxes) == [1]
    session.undo("q")
    assert session.board.boxes == {} and session.board.shown == [] and session.question == "q"
    session.undo("q")
    assert "no box" in session.status
    for x, y in ((0, 0), (80, 80)):
        session.click("", x, y)
    assert list(session.board.boxes) == [2]


def test_boxes_are_bounded_and_no_picture_takes_none(session):
    for _ in range(MAX_CLICKED):
        session.click("", 0, 0)
        session.click("", 80, 80)
    session.click("", 0, 0)
    assert len(session.board.boxes) == MAX_CLICKED and session.board.corner is None and str(MAX_CLICKED) in session.status
    session.start()
    session.click("", 5, 5)
    assert "no picture" in session.status and session.board.drawn() is None and not session.board.boxes


# --- questions and answers


def test_a_question_names_boxes_and_the_model_gets_them(session, model, monkeypatch):
    session.board.add((10, 5, 30, 25))
    session.board.add((40, 5, 60, 25))
    calls, real = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: calls.append(a) or real(*a, **k))
    steps = ask(session, "  Is [2] left of [1], or [2] right?  ", model)
    next(steps)
    assert len(session.turns) == 1 and session.question == "" and "answering" in session.status
    next(steps)
    ((image,), (text,), (boxes,)) = calls[0]
    assert image is session.board.picture and text == "Is <region:0> left of <region:1>, or <region:0> right?"
    assert boxes == [(40, 5, 60, 25), (10, 5, 30, 25)]
    assert [turn["role"] for turn in session.turns] == ["user", "assistant"]
    assert colour(1) in session.turns[0]["content"] and session.turns[0]["content"].count(colour(2)) == 2


def test_boxes_of_an_answer_are_drawn_in_pixels_and_coloured_alike(session, model):
    hear(session, "here [250, 375, 750, 625] & there [000, 250, 500, 750] [sic]", model)
    # The square is 80 px wide with the picture in its middle half: y in [0.25, 0.75] is the picture.
    for number, expected in {1: (20, 10, 60, 30), 2: (0, 0, 40, 40)}.items():
        assert np.allclose(session.board.boxes[number], expected, atol=0.05)
        assert colour(number) in session.turns[0]["content"]
    assert "&amp; there" in session.turns[0]["content"] and "not drawn" not in session.turns[0]["content"]
    assert session.board.shown == [1, 2] and "[2]" in session.status
    (text, numbers) = session.board.read("What is [2]?")
    assert (text, numbers) == ("What is <region:0>?", [2])
    list(ask(session, "What is [2]?", model))
    assert 1 not in session.board.shown and 2 in session.board.shown  # an earlier answer's box makes room


def test_boxes_of_location_tokens_are_drawn_and_escaped(session, model, monkeypatch):
    monkeypatch.setattr(model, "codec", BoxCodec("loc_tokens"))
    hear(session, "<b> <loc_250><loc_375><loc_750><loc_625> [250, 375, 750, 625]", model)
    assert list(session.board.boxes) == [1] and np.allclose(session.board.boxes[1], (20, 10, 60, 30), atol=0.05)
    said = session.turns[0]["content"]
    assert "&lt;b&gt; <span" in said and "&lt;loc_250&gt;" in said and said.endswith("</span> [250, 375, 750, 625]</div>")


def test_an_answers_bad_box_says_why_and_an_empty_answer_is_said(session, model):
    hear(session, "[700, 100, 200, 900] [000, 000, 500, 100]", model)
    assert session.board.boxes == {} and session.turns[0]["content"].count("is not drawn") == 2
    assert "not left of" in session.turns[0]["content"] and "padding" in session.turns[0]["content"]
    hear(session, "", model)
    assert "said nothing" in session.turns[1]["content"]


def test_a_visitors_words_are_escaped_and_box_numbers_coloured():
    text = coloured_names("<b>what</b> is [1]?")
    assert "<b>" not in text and "&lt;b&gt;" in text and colour(1) in text


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("   ", "empty"),
        ("x" * (MAX_QUESTION + 1), f"{MAX_QUESTION + 1} characters"),
        ("What is [7]?", "no box [7]"),
        ("<image> again?", "<image>"),
        ("What is <region:0>?", "<region:0>"),
        ("What is <region>?", "<region>"),
        ("stop </s> here", "</s>"),
    ],
)
def test_what_cannot_be_asked_gets_one_sentence(question, said, session, model):
    assert len(list(ask(session, question, model))) == 1
    assert said in session.status and session.turns == [] and session.question == question.strip()


@pytest.mark.parametrize(
    "question", ["我在哪里？", "איפה הלב האדום?", "🐸" * 50, "a\x00b \ud800?", "**a** <b>&</b> ![](x) $$y$$"]
)
def test_any_script_can_be_asked_and_nothing_in_it_is_markup(question, session, model):
    assert len(list(ask(session, question, model))) == 2 and len(session.turns) == 2
    content = session.turns[0]["content"].removeprefix('<div dir="auto">').removesuffix("</div>")
    assert "<" not in content


def test_asking_without_a_picture_and_while_another_picture_comes(session, model):
    steps = ask(session, "Where is the red square?", model)
    next(steps)
    session.start(Image.new("RGB", (10, 10)))
    next(steps)
    assert session.turns == []  # the answer belonged to the chat before
    session.start()
    list(ask(session, "Where is the red square?", model))
    assert "no picture" in session.status


def test_random_answers_never_break_the_chat(session, model):
    rng = random.Random(0)
    for _ in range(200):
        hear(session, "".join(rng.choice("[]0123456789, .-<>&") for _ in range(40)), model)
    assert session.board.drawn() is not None and all(x2 > x1 and y2 > y1 for x1, y1, x2, y2 in session.board.boxes.values())


# --- the model and the server


def test_a_model_that_is_missing_or_broken_is_one_sentence(tmp_path, model):
    with pytest.raises(DataError, match="make quickstart.*make reproduce"):
        load(tmp_path / "none")
    with pytest.raises(DataError, match="grounding.json"):
        load(tmp_path)
    model.settings.write(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read") as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def served(model):
    """The page, and its address on a free port of this machine."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (the extra `demo`); the page itself is not tested")
    page = build_page(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve(page, "127.0.0.1", port)
    yield page, page.local_url.rstrip("/")
    page.close()


def test_the_page_opens_and_no_file_of_the_server_can_be_read(served, tmp_path):
    page, address = served
    assert address.startswith("http://127.0.0.1:") and page.share_url is None
    with urllib.request.urlopen(address, timeout=60) as answer:
        assert answer.status == 200 and b"Open CLOC" in answer.read()
    (tmp_path / "secret.txt").write_text("secret")
    for path in ("/etc/passwd", "pyproject.toml", __file__, tmp_path / "secret.txt"):
        with pytest.raises(urllib.error.HTTPError, match="40[34]"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=60)


def test_a_picture_comes_in_by_upload_only(served, tmp_path):
    """The page's own upload works; the same event with a path of the server's instead is refused."""
    page, address = served
    secret = saved(tmp_path, Image.new("RGB", (50, 30)), "secret.png")
    buffer = io.BytesIO()
    Image.new("RGB", (60, 20), (0, 200, 0)).save(buffer, "PNG")
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + buffer.getvalue() + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/upload", body, kind), timeout=60) as answer:
        (uploaded,) = json.load(answer)
    taken, refused = (upload_event(page, address, str(path)) for path in (uploaded, secret))
    assert taken["success"] and taken["output"]["data"][1]["path"].endswith(".webp")
    assert not refused["success"] and str(tmp_path) not in json.dumps(refused)


def upload_event(page, address: str, path: str) -> dict:
    """What the server says to the page's event "this picture came in"."""
    index = next(index for index, fn in page.fns.items() if any(event == "upload" for _, event in fn.targets))
    file = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [None, file], "fn_index": index, "session_hash": path[-40:]}).encode()
    kind = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/queue/join", body, kind), timeout=60).read()
    stream = f"{address}/gradio_api/queue/data?session_hash={urllib.request.quote(path[-40:])}"
    with urllib.request.urlopen(stream, timeout=60) as lines:
        for line in lines:
            message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("the server said nothing")


def test_a_port_in_use_is_one_sentence(served, model):
    with pytest.raises(DataError, match="--port"):
        serve(build_page(model), "127.0.0.1", served[0].server_port)
