"""A chat about one picture, in the browser: ask where a thing is, or click a box and ask what lies in it.

    python demo/app.py [--model DIR] [--host 127.0.0.1] [--port 7860]

Every box has a number and a colour, whether the visitor clicked it or the model answered it, and "[1]" in a question
means that box. The model is given the picture, the question and the boxes named in it; earlier turns are shown, not given.
"""

import argparse
import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from demo.drawing import MAX_QUESTION, NO_PICTURE, Board, coloured, coloured_names, draw_examples, open_picture
from encoder.data.prompts import REFERRING_QUESTION
from encoder.errors import DataError, run_main
from mllm.generation import GroundingModel

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "weights" / "mllm_cloc"
MAX_UPLOAD = "30mb"
MAX_ANSWER = 128  # tokens
QUEUE, SESSIONS = 16, 64  # events that may wait, visitors whose chat is kept

WELCOME = "Ask where something is, or click two corners on the picture to draw a box."
TITLE = """# A box on the picture is part of the sentence
Ask **where** something is: the answer's box is drawn on the picture, in the colour of its words. Ask about a **place**:
click two opposite corners on the picture and name the box by its number, as in *What is [1]?*"""
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.prose { opacity: 1 !important; }
#examples .grid-wrap { min-height: 0; height: auto; } #picture img { cursor: crosshair; max-width: 100%; }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
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

    def start(self, picture: Image.Image | None = None, suggestion: str = "") -> None:
        """An empty chat about a picture (RGB), or about none yet; `suggestion` is put into the question box."""
        status = NO_PICTURE if picture is None else WELCOME
        self.__init__(Board(picture), status=status, question=suggestion, suggestion=suggestion)

    def say(self, role: str, words: str) -> None:
        self.turns.append({"role": role, "content": f'<div dir="auto">{words}</div>'})  # no Markdown in a block of HTML

    def put(self, path: str) -> None:
        """A new chat about the uploaded file; one that is no picture leaves the chat as it was."""
        try:
            self.start(open_picture(path))
        except DataError as error:
            self.status = str(error)

    def click(self, question: str, x: float, y: float) -> None:
        """A click at x, y in pixels of the drawn picture; a box it completes is asked about, unless `question` is their own."""
        count = self.board.count
        self.question, self.status = question, self.board.click(x, y)
        if self.board.count > count and question.strip() in ("", self.suggestion):
            self.question = self.suggestion = REFERRING_QUESTION.format(f"[{self.board.count}]")

    def undo(self, question: str) -> None:
        self.question, self.status = question, self.board.undo()

    def clear(self) -> None:
        self.start(self.board.picture)


def ask(session: Session, question: str, model: GroundingModel) -> Iterator[None]:
    """Puts the question into the chat, yields, puts the answer in, yields; what cannot be asked gives a status instead."""
    question = question.encode("utf-8", "replace").decode().strip()
    session.question, board = question, session.board
    try:
        text, numbers = board.read(question, model.tokenizer.all_special_tokens)
        session.say("user", coloured_names(question))
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


def hear(session: Session, answer: str, model: GroundingModel) -> None:
    """An answer goes into the chat, each box in it onto the picture and into its colour.

    What has the form of a box, in the model's own codec, and is none says why.
    """
    words, notes, before, session.status = "", "", 0, WELCOME
    for start, end in model.codec.spans(answer):
        written = html.escape(answer[start:end])
        box, reason = model.decode_box(answer[start:end], session.board.picture.size)
        words += html.escape(answer[before:start])
        if box is None:
            notes += f"<br><small>{written} is not drawn: {html.escape(reason)}</small>"
            words += written
        else:
            number = session.board.add(box)
            session.status = f"Box [{number}] is on the picture; ask about it by its number."
            words += coloured(number, written)
        before = end
    words += html.escape(answer[before:])
    session.say("assistant", (words or "<i>The model said nothing.</i>") + notes)


def load(folder: Path) -> GroundingModel:
    if not folder.is_dir():
        makers = "`make quickstart` (runs/quickstart/mllm_cloc) or `make reproduce` (runs/base/mllm_cloc)"
        raise DataError(f"there is no MLLM in {folder}; make one with {makers} and name its folder with --model")
    return GroundingModel.from_pretrained(folder)


def build_page(model: GroundingModel):
    """The page, a `gradio.Blocks`, with the first example on it."""
    import gradio as gr

    examples = draw_examples()
    first = Session()
    first.start(*examples[0])

    def view(session: Session) -> tuple:
        status = f'<div role="status">{html.escape(session.status)}</div>'
        return session, session.board.drawn(), session.turns, status, session.question

    def shows(act):
        return lambda session, *inputs: (act(session, *inputs), view(session))[1]

    def on_click(session: Session, question: str, event: gr.SelectData) -> tuple:
        return shows(Session.click)(session, question, *event.index)

    def on_example(session: Session, event: gr.SelectData) -> tuple:
        return shows(Session.start)(session, *examples[event.index])

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
                    undo_button, clear_button = gr.Button("Undo box"), gr.Button("Clear chat and boxes")
            with gr.Column():
                chat = gr.Chatbot(height=440, show_label=False, latex_delimiters=[], buttons=[], placeholder="Answers come here.")
                with gr.Row(equal_height=True):
                    question = gr.Textbox(text, show_label=False, placeholder="Where is ...?", max_length=MAX_QUESTION, scale=5)
                    send = gr.Button("Ask", variant="primary", min_width=80)
                gr.Markdown("Or begin with one of these pictures:")
                small = [image.resize((3 * image.width, 3 * image.height)) for image, _ in examples]
                gallery = gr.Gallery(
                    small, show_label=False, columns=4, height="auto", allow_preview=False, buttons=[], elem_id="examples"
                )
        options = {"outputs": [state, picture, chat, status, question], "api_visibility": "private", "show_progress": "hidden"}
        picture.upload(shows(Session.put), [state, picture], **options)
        picture.clear(shows(Session.start), [state], **options)
        picture.select(on_click, [state, question], **options)
        gallery.select(on_example, [state], **options)
        undo_button.click(shows(Session.undo), [state, question], **options)
        gr.on([clear_button.click, chat.clear], shows(Session.clear), [state], **options)
        gr.on([question.submit, send.click], on_ask, [state, question], **options)
    return page.queue(max_size=QUEUE, default_concurrency_limit=1)


def serve(page, host: str, port: int) -> None:
    """Starts the page's server and returns; nothing is shared, and of the server's files only visitors' own are given out."""
    import gradio as gr

    theme = gr.themes.Soft(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))  # no font from afar
    limits = {"max_file_size": MAX_UPLOAD, "state_session_capacity": SESSIONS, "share": False}
    look = {"theme": theme, "css": CSS, "footer_links": [], "ssr_mode": False, "quiet": True}
    try:
        page.launch(server_name=host, server_port=port, prevent_thread_lock=True, **limits, **look)
    except OSError as error:
        raise DataError(f"{host}:{port} is in use or not of this machine; give another --port or --host") from error


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
