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

from demo.drawing import NO_PICTURE, Board, coloured, draw_examples, open_picture
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
WELCOME = "Ask where something is, or click two corners on the picture to draw a box."
TITLE = """# A box on the picture is part of the sentence
Ask **where** something is: the answer's box is drawn on the picture, in the colour of its words. Ask about a **place**:
click two opposite corners on the picture and name the box by its number, as in *What is [1]?*"""
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#picture img { cursor: crosshair; }
.box { color: white; border-radius: 4px; padding: 1px 6px; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""


@dataclass
class Session:
    """What one visitor sees.

    board: the picture and its boxes; turns: the chat's messages in HTML; status: one sentence below the picture
    question: what stands in the question box; suggestion: what of it we put there, and so may replace
    """

    board: Board = field(default_factory=Board)
    turns: list[dict[str, str]] = field(default_factory=list)
    status: str = NO_PICTURE
    question: str = ""
    suggestion: str = ""

    def start(self, picture: Image.Image | None, suggestion: str = "") -> None:
        """An empty chat about a picture (RGB), or about none yet; `suggestion` is put into the question box."""
        status = NO_PICTURE if picture is None else WELCOME
        self.__init__(Board(picture), status=status, question=suggestion, suggestion=suggestion)

    def say(self, role: str, words: str) -> None:
        self.turns.append({"role": role, "content": f'<div dir="auto">{words}</div>'})  # no Markdown in a block of HTML


def put(session: Session, path: str | None) -> None:
    """A new chat about the uploaded file; one that is no picture leaves the chat as it was."""
    try:
        session.start(None if path is None else open_picture(path))
    except DataError as error:
        session.status = str(error)


def click(session: Session, question: str, x: float, y: float) -> None:
    """A click at x, y in pixels of the drawn picture; a box it completes is asked about, unless `question` is the visitor's."""
    count = session.board.count
    session.question, session.status = question, session.board.click(x, y)
    if session.board.count > count and question.strip() in ("", session.suggestion):
        session.question = session.suggestion = REFERRING_QUESTION.format(f"[{session.board.count}]")


def ask(session: Session, question: str, model: GroundingModel) -> Iterator[None]:
    """Puts the question into the chat, yields, puts the answer in, yields; what cannot be asked gives a status instead."""
    question = question.encode("utf-8", "replace").decode().strip()
    session.question, board = question, session.board
    try:
        text, numbers = read_question(board, question, model)
        session.say("user", NAMED.sub(lambda match: coloured(int(match[1])), html.escape(question)))
        board.shown, board.corner = sorted({*board.clicked, *numbers}), None
        session.question, session.status = "", "The model is answering."
        boxes = [board.boxes[number] for number in numbers]
        yield
        (answer,) = model.generate([board.picture], [text], [boxes], max_new_tokens=MAX_ANSWER, progress=False)
    except DataError as error:
        session.status = str(error)
    else:
        if session.board is board:  # else the visitor has meanwhile begun another chat
            hear(session, answer, model)
    yield


def read_question(board: Board, question: str, model: GroundingModel) -> tuple[str, list[int]]:
    """A visitor's words -> the model's, with `<region:i>` for each box named, and the numbers of these boxes."""
    if board.picture is None:
        raise DataError(NO_PICTURE)
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
    words, notes, end, session.status = "", "", 0, WELCOME
    for match in BRACKETS.finditer(answer):
        box, reason = model.decode_box(match[0], session.board.picture.size)
        written = html.escape(match[0])
        if box is None:
            notes += f"<br><small>{written} is not drawn: {html.escape(reason)}</small>"
        else:
            number = session.board.add(box)
            written = coloured(number, written)
            session.status = f"Box [{number}] is on the picture; ask about it by its number."
        words += html.escape(answer[end : match.start()]) + written
        end = match.end()
    words += html.escape(answer[end:])
    session.say("assistant", (words or "<i>The model said nothing.</i>") + notes)


def load(folder: Path) -> GroundingModel:
    if not folder.is_dir():
        raise DataError(
            f"there is no MLLM in {folder}; make one with `make quickstart` (runs/quickstart/mllm_cloc) or, from zero, "
            "`make reproduce` (runs/base/mllm_cloc), and name its folder with --model"
        )
    try:
        return GroundingModel.from_pretrained(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DataError(f"the model in {folder} cannot be loaded ({str(error).splitlines()[0]}); make it again") from error


def build_page(model: GroundingModel):
    """The page, a `gradio.Blocks`, with the first example on it."""
    import gradio as gr

    examples = draw_examples()
    first = Session()
    first.start(*examples[0])

    def view(session: Session) -> tuple:
        status = f'<div role="status">{html.escape(session.status)}</div>'
        return session, session.board.drawn(), session.turns, status, session.question

    def on_put(session: Session, path: str | None) -> tuple:
        put(session, path)
        return view(session)

    def on_click(session: Session, question: str, event: gr.SelectData) -> tuple:
        click(session, question, *event.index)
        return view(session)

    def on_undo(session: Session, question: str) -> tuple:
        session.question, session.status = question, session.board.undo()
        return view(session)

    def on_restart(session: Session) -> tuple:
        session.start(session.board.picture)
        return view(session)

    def on_example(session: Session, event: gr.SelectData) -> tuple:
        session.start(*examples[event.index])
        return view(session)

    def on_ask(session: Session, question: str) -> Iterator[tuple]:
        for _ in ask(session, question, model):
            yield view(session)

    with gr.Blocks(title="Open CLOC", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(TITLE)
        state, (_, shown, _, line, text) = gr.State(first, time_to_live=3600), view(first)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(shown, sources=["upload", "clipboard"], show_label=False, height=440, elem_id="picture")
                # Gradio would decode an upload itself and fail in its own words; its check of where the file lies stays.
                picture.preprocess = lambda payload: payload and payload.path
                status = gr.HTML(line)
                with gr.Row():
                    undo, restart = gr.Button("Undo box"), gr.Button("Clear chat and boxes")
            with gr.Column():
                chat = gr.Chatbot(height=440, show_label=False, latex_delimiters=[], buttons=[], feedback_options=None)
                with gr.Row(equal_height=True):
                    question = gr.Textbox(text, show_label=False, placeholder="Where is ...?", max_length=MAX_QUESTION, scale=5)
                    send = gr.Button("Ask", variant="primary", min_width=80)
                gallery = gr.Gallery(
                    [image.resize((3 * image.width, 3 * image.height)) for image, _ in examples],
                    label="Examples", columns=4, height=160, allow_preview=False, buttons=[], elem_id="examples",
                )  # fmt: skip
        options = {"outputs": [state, picture, chat, status, question], "api_visibility": "private", "show_progress": "hidden"}
        gr.on([picture.input, picture.clear], on_put, [state, picture], **options)
        picture.select(on_click, [state, question], **options)
        gallery.select(on_example, [state], **options)
        undo.click(on_undo, [state, question], **options)
        restart.click(on_restart, [state], **options)
        gr.on([question.submit, send.click], on_ask, [state, question], **options)
    return page.queue(max_size=QUEUE, default_concurrency_limit=1)


def serve(page, host: str, port: int) -> None:
    """Starts the page's server and returns; nothing is shared, and of the server's files only visitors' own are given out."""
    import gradio as gr

    theme = gr.themes.Soft(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))  # no font from afar
    options = {"max_file_size": MAX_UPLOAD, "state_session_capacity": SESSIONS, "footer_links": [], "theme": theme, "css": CSS}
    try:
        page.launch(
            server_name=host, server_port=port, share=False, ssr_mode=False, quiet=True, prevent_thread_lock=True, **options
        )
    except OSError as error:
        raise DataError(f"{host}:{port} cannot be served ({error}); give another --port or --host") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="MLLM folder (default weights/mllm_cloc)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    if find_spec("gradio") is None:
        raise DataError("gradio is not installed; run `make demo`, or pip install -e '.[demo]'")
    page = build_page(load(arguments.model))
    serve(page, arguments.host, arguments.port)
    print(f"the chat is open at http://{arguments.host}:{arguments.port} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_main(main)
