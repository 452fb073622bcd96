"""What programs call: three functions of the running demo, by `gradio_client`; docs/demo.md shows how."""

import json
from functools import wraps

import gradio as gr

from demo.board import Board
from demo.models import Models, Settings
from demo.pictures import open_picture
from demo.session import Session, ask, reply_record
from encoder.errors import DataError

MAX_REGIONS = 30


def add_api(models: Models, point_reach: float, options: dict) -> None:
    """Adds `/ask`, `/rank` and `/find` to the page that is being built; `options` of their events."""

    def session_on(path: str | None, regions: object = None) -> tuple[Session, list[int]]:
        """A chat about an uploaded picture with these marks on it, and their numbers."""
        if path is None:
            raise DataError("There is no picture; give one with gradio_client.handle_file.")
        image, scale = open_picture(path)
        session = Session(Board(image, scale=scale, point_reach=point_reach))
        return session, [session.board.draw(*as_mark(value, scale)) for value in as_list(regions)]

    def answer(picture: str | None, question: str, regions: object, temperature: float, max_new_tokens: float) -> dict:
        session, _ = session_on(picture, regions)
        for _ in ask(session, question or "", models, Settings(float(temperature or 0), int(max_new_tokens or 128))):
            continue
        if not session.turns:
            raise DataError(session.status)
        return {"answers": [reply_record(reply, session.board) for reply in session.turns[0].replies]}

    def rank(picture: str | None, regions: object, labels: object) -> dict:
        session, numbers = session_on(picture, regions)
        board = session.board
        ranked = models.rank(board.picture, [board.marks[number].box for number in numbers], texts(labels))
        keys = ("label", "cosine", "share")
        return {"ranking": [[dict(zip(keys, row, strict=True)) for row in rows] for rows in ranked]}

    def find(picture: str | None, phrases: object) -> dict:
        session, _ = session_on(picture)
        names = texts(phrases)
        found = models.find(session.board.picture, names)
        return {
            "found": [
                {"phrase": name, "box": session.board.to_file(box), "cosine": score}
                for name, (box, score) in zip(names, found, strict=True)
            ]
        }

    with gr.Row(visible=False):  # components that only give the functions their types
        # A file's own check of where it lies stays; the picture is opened here, in our words.
        picture = gr.File(label="picture", type="filepath")
        question = gr.Textbox(label="question")
        regions = gr.JSON(label="regions")
        temperature = gr.Number(0, label="temperature")
        length = gr.Number(128, label="max_new_tokens")
        labels = gr.JSON(label="labels")
        result = gr.JSON(label="result")
        buttons = [gr.Button() for _ in range(3)]
    for button, name, function, inputs in (
        (buttons[0], "ask", answer, [picture, question, regions, temperature, length]),
        (buttons[1], "rank", rank, [picture, regions, labels]),
        (buttons[2], "find", find, [picture, labels]),
    ):
        button.click(in_words(function), inputs, [result], api_name=name, **options)


def in_words(function):
    """A user's error as the caller's own exception, in its words."""

    @wraps(function)  # its parameters' names are those that a caller uses
    def called(*inputs) -> dict:
        try:
            return function(*inputs)
        except DataError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return called


def as_list(value: object) -> list:
    """A list, or its JSON text; nothing is an empty one."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"A list is needed, this is no JSON: {error}.") from error
    value = [] if value is None else value
    if not isinstance(value, list) or len(value) > MAX_REGIONS:
        raise DataError(f"A list of at most {MAX_REGIONS} is needed, this is {str(value)[:60]}.")
    return value


def texts(value: object) -> list[str]:
    """A list of texts."""
    return [str(item) for item in as_list(value)]


def as_mark(value: object, scale: float) -> tuple[str, list]:
    """[x1, y1, x2, y2] or [x, y], in pixels of the caller's file -> a mark's kind and its points on the board."""
    if isinstance(value, list) and len(value) in (2, 4) and all(isinstance(number, int | float) for number in value):
        points = [[number / scale for number in value[first : first + 2]] for first in range(0, len(value), 2)]
        return ("box" if len(points) == 2 else "point"), points
    raise DataError(f"A region is [x1, y1, x2, y2] or [x, y] in pixels, this is {str(value)[:60]}.")
