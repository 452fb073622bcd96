"""A chat about one picture, in the browser: ask where a thing is, or click a box and ask what lies in it.

    python demo/app.py [--model DIR] [--host 127.0.0.1] [--port 7860]

Every box has a number and a colour, whether the visitor clicked it or the model answered it, and "[1]" in a question
means that box. The model is given the picture, the question and the boxes named in it; earlier turns are shown, not given.
"""

import argparse
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError

from demo.drawing import Board, colour, draw_examples, open_picture
from encoder.data.prompts import REFERRING_QUESTION
from encoder.errors import DataError, run_main
from mllm.conversation import IMAGE, PLACEHOLDER
from mllm.generation import GroundingModel

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "weights" / "mllm_cloc"
MAX_UPLOAD = "30mb"
MAX_QUESTION = 400  # characters
MAX_ANSWER = 128  # tokens
QUEUE, SESSIONS = 16, 64  # events that may wait, visitors whose chat is kept

NAMED = re.compile(r"\[(\d{1,4})\]")  # a box's number in a question
BRACKETS = re.compile(r"\[[^\[\]]*\]")  # what may be a box in an answer
NO_PICTURE = "There is no picture; put one in, or take one of the examples."
WELCOME = "Ask where something is, or click two corners on the picture to draw a box."
TITLE = """# A box on the picture is part of the sentence
Ask **where** something is: the answer's box is drawn on the picture, in the colour of its words. Ask about a **place**:
click two opposite corners on the picture and name the box by its number, as in *What is [1]?*"""
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#picture img { cursor: crosshair; }
#status { min-height: 1.5em; }
.box { color: white; border-radius: 4px; padding: 1px 6px; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""


@dataclass
class Session:
    """What one visitor sees.

    board: the picture and its boxes, or None; turns: the chat's messages in HTML; status: one sentence below the picture
    question: what stands in the question box; suggestion: the part of it that we put there, and so may replace
    """

    board: Board | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    status: str = NO_PICTURE
    question: str = ""
    suggestion: str = ""


def start(session: Session, picture: Image.Image | None, suggestion: str = "") -> None:
    """An empty chat about a picture (RGB), or about none yet; `suggestion` is put into the question box."""
    board, status = (None, NO_PICTURE) if picture is None else (Board(picture), WELCOME)
    session.__init__(board, status=status, question=suggestion, suggestion=suggestion)


def put(session: Session, path: str | None) -> None:
    """A new chat about the uploaded file; one that is no picture leaves the chat as it was."""
    try:
        start(session, None if path is None else open_picture(path))
    except DataError as error:
        session.status = str(error)


def click(session: Session, question: str, x: float, y: float) -> None:
    """A click at x, y in pixels of the drawn picture; a box it completes is asked about, unless `question` stands there."""
    session.question = question
    try:
        number = _board(session).click(x, y)
    except DataError as error:
        session.status = str(error)
        return
    if number is None:
        session.status = "Now click the opposite corner."
        return
    session.status = f"This is box [{number}]; name it in a question by its number."
    if question.strip() in ("", session.suggestion):
        session.question = session.suggestion = REFERRING_QUESTION.format(f"[{number}]")


def undo(session: Session) -> None:
    try:
        number = _board(session).undo()
        session.status = "The first corner is gone." if number is None else f"Box [{number}] is gone."
    except DataError as error:
        session.status = str(error)


def ask(session: Session, question: str, model: GroundingModel) -> Iterator[None]:
    """Puts the question into the chat, yields, puts the answer in, yields; what cannot be asked gives a status instead."""
    question = question.encode("utf-8", "replace").decode().strip()
    session.question, turns = question, session.turns
    try:
        text, numbers = read_question(session, question, model)
        board = session.board
        words = NAMED.sub(lambda match: _coloured(int(match[1])), html.escape(question))
        turns.append(_message("user", words))
        board.shown, board.corner = sorted({*board.clicked, *numbers}), None
        session.question, session.status = "", "The model is answering."
        yield
        boxes = [board.boxes[number] for number in numbers]
        (answer,) = model.generate([board.picture], [text], [boxes], max_new_tokens=MAX_ANSWER, progress=False)
    except DataError as error:
        session.status = str(error)
    else:
        if session.turns is turns:  # else the visitor has meanwhile begun another chat
            hear(session, answer, model)
    yield


def read_question(session: Session, question: str, model: GroundingModel) -> tuple[str, list[int]]:
    """A visitor's words -> the model's, with `<region:i>` for each box named, and the numbers of these boxes."""
    board = _board(session)
    if not question:
        raise DataError("The question is empty; write one.")
    if len(question) > MAX_QUESTION:
        raise DataError(f"The question has {len(question)} characters; ask in at most {MAX_QUESTION}.")
    marks = [IMAGE, "<region>", *model.tokenizer.all_special_tokens, *(match[0] for match in PLACEHOLDER.finditer(question))]
    for mark in marks:
        if mark in question:
            raise DataError(f"The question holds {mark}, which is a mark of the model's own; leave it out.")
    numbers = list(dict.fromkeys(int(match[1]) for match in NAMED.finditer(question)))
    for number in numbers:
        if number not in board.boxes:
            raise DataError(f"There is no box [{number}]; click two corners on the picture to draw one.")
    return NAMED.sub(lambda match: f"<region:{numbers.index(int(match[1]))}>", question), numbers


def hear(session: Session, answer: str, model: GroundingModel) -> None:
    """An answer goes into the chat, each box in it onto the picture and into its colour; what is no box says why."""
    words, notes, end, status = "", "", 0, WELCOME
    for match in BRACKETS.finditer(answer):
        box, reason = model.decode_box(match[0], session.board.picture.size)
        words += html.escape(answer[end : match.start()])
        if box is None:
            words += html.escape(match[0])
            notes += f"<br><small>{html.escape(match[0])} is not drawn: {html.escape(reason)}</small>"
        else:
            number = session.board.add(box)
            words += _coloured(number, html.escape(match[0]))
            status = f"Box [{number}] is on the picture; ask about it by its number."
        end = match.end()
    words += html.escape(answer[end:])
    session.turns.append(_message("assistant", (words or "<i>The model said nothing.</i>") + notes))
    session.status = status


def _board(session: Session) -> Board:
    if session.board is None:
        raise DataError(NO_PICTURE)
    return session.board


def _coloured(number: int, words: str = "") -> str:
    return f'<span class="box" style="background-color: {colour(number)}">{f"[{number}] {words}".strip()}</span>'


def _message(role: str, words: str) -> dict[str, str]:
    return {"role": role, "content": f'<div dir="auto">{words}</div>'}  # in a block of HTML nothing is Markdown


def load(folder: Path) -> GroundingModel:
    """The model, or DataError in one sentence."""
    if not folder.is_dir():
        raise DataError(
            f"there is no MLLM in {folder}; make one with `make quickstart` (runs/quickstart/mllm_cloc) or, from zero, "
            "`make reproduce` (runs/base/mllm_cloc), and name its folder with --model"
        )
    try:
        return GroundingModel.from_pretrained(folder)
    except (OSError, RuntimeError, SafetensorError, KeyError, AttributeError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"the model in {folder} cannot be loaded ({first_line}); train or copy the folder again") from error


def build_page(model: GroundingModel):
    """The page, a `gradio.Blocks`, with the first example on it; every event goes through one of the functions above."""
    import gradio as gr

    examples = draw_examples()
    first = Session()
    start(first, *examples[0])

    def view(session: Session) -> tuple:
        picture = None if session.board is None else session.board.drawn()
        return session, picture, session.turns, f'<div role="status">{html.escape(session.status)}</div>', session.question

    def on_put(session: Session, path: str | None) -> tuple:
        put(session, path)
        return view(session)

    def on_click(session: Session, question: str, event: gr.SelectData) -> tuple:
        click(session, question, *event.index)
        return view(session)

    def on_undo(session: Session, question: str) -> tuple:
        session.question = question
        undo(session)
        return view(session)

    def on_restart(session: Session) -> tuple:
        start(session, session.board and session.board.picture)
        return view(session)

    def on_example(session: Session, event: gr.SelectData) -> tuple:
        start(session, *examples[event.index])
        return view(session)

    def on_ask(session: Session, question: str) -> Iterator[tuple]:
        for _ in ask(session, question, model):
            yield view(session)

    with gr.Blocks(title="Open CLOC", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(TITLE)
        _, shown, _, line, text = view(first)
        state = gr.State(first, time_to_live=3600)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    shown, sources=["upload", "clipboard"], show_label=False, height=480, buttons=[], elem_id="picture"
                )
                # Gradio would decode the upload itself and show its own error; the check of where the file lies stays.
                picture.preprocess = lambda payload: payload and payload.path
                status = gr.HTML(line, elem_id="status")
                with gr.Row():
                    undo_button, restart_button = gr.Button("Undo box"), gr.Button("Clear chat and boxes")
                gallery = gr.Gallery(
                    [image.resize((240, 240 * image.height // image.width)) for image, _ in examples],
                    label="Examples", columns=4, height=150, allow_preview=False, object_fit="contain", buttons=[],
                )  # fmt: skip
            with gr.Column():
                chat = gr.Chatbot(height=480, show_label=False, latex_delimiters=[], buttons=[], feedback_options=None)
                question = gr.Textbox(text, label="Question", max_length=MAX_QUESTION, submit_btn="Ask", elem_id="question")
        outputs = [state, picture, chat, status, question]
        options = {"outputs": outputs, "api_visibility": "private", "show_progress": "hidden"}
        picture.input(on_put, [state, picture], **options)
        picture.select(on_click, [state, question], **options)
        gallery.select(on_example, [state], **options)
        undo_button.click(on_undo, [state, question], **options)
        restart_button.click(on_restart, [state], **options)
        question.submit(on_ask, [state, question], **options)
    return page.queue(max_size=QUEUE, default_concurrency_limit=1)


def serve(page, host: str, port: int, **options) -> None:
    """Starts the page's server, in this process alone: nothing is shared, and only what visitors put in can be read."""
    import gradio as gr

    theme = gr.themes.Soft(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))  # none from a server
    limits = {"max_file_size": MAX_UPLOAD, "state_session_capacity": SESSIONS}
    look = {"theme": theme, "css": CSS, "footer_links": []}
    try:
        page.launch(server_name=host, server_port=port, share=False, ssr_mode=False, quiet=True, **limits, **look, **options)
    except OSError as error:
        raise DataError(f"{host}:{port} cannot be served ({error}); give another --port or --host") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, help="folder of finetune_mllm.py (default weights/mllm_cloc)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    if find_spec("gradio") is None:
        raise DataError("gradio is not installed; run `make demo`, or pip install -e '.[demo]'")
    page = build_page(load(arguments.model))
    serve(page, arguments.host, arguments.port, prevent_thread_lock=True)
    print(f"the chat is open at http://{arguments.host}:{arguments.port} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_main(main)
