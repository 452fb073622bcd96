"""The page: a board and a chat beside it, an encoder alone, settings, downloads. What it says and does is `demo.session`'s."""

import html
import json
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from demo.api import add_api
from demo.board import ENCODER, MAX_QUESTION
from demo.drawing import draw_marks
from demo.models import MAX_ANSWER, Models, Settings, devices, told_of_devices
from demo.pictures import MAX_BYTES, Example, draw_examples, encoded, to_url
from demo.session import Session, ask, conversation
from demo.words import board_value, messages, ranking_html, status_html
from encoder.errors import DataError

QUEUE, SESSIONS = 16, 64  # events that may wait, visitors whose chat is kept
BITS = {"full weights": None, "8-bit weights": 8, "4-bit weights": 4}
ONE = {"concurrency_id": "model", "concurrency_limit": 1}  # of the events that run a model
HERE = Path(__file__).parent
CSS, SCRIPT = (HERE / "page.css").read_text(), (HERE / "board.js").read_text()
TITLE = """# A box on the picture is part of the sentence
Ask **where** something is: its box is drawn on the picture in the colour of its words. Ask about a **place**: drag a box, click a
point or scribble on the picture, and name it by its number, as in *What is [1]?*"""
BOARD = """<div class="stage"></div>
<div class="tools"><button type="button" class="pen" aria-pressed="false" title="Any line">Scribble</button></div>"""
SAVE = """(file) => { if (!file || !file.url) return; const link = document.createElement("a");
link.href = file.url; link.download = file.name; link.click(); }"""


def build_page(models: Models, point_reach: float, reloads: bool = True) -> gr.Blocks:
    """The page with the first example on it; `reloads`: visitors may put the models on another device."""
    examples = draw_examples()
    first = Session()
    first.board.point_reach = point_reach
    first.start_example(examples[0])
    names = [speaker.name for speaker in models.speakers]

    def view(session: Session, board: bool = True) -> tuple:
        shown = board_value(session.board, names) if board else gr.skip()
        return session, shown, messages(session), status_html(session.status), session.question

    def shows(act):
        return lambda session, *inputs: (act(session, *inputs), view(session))[1]

    def on_mark(session: Session, question: str, event: gr.EventData) -> tuple:
        return shows(Session.draw)(session, question, event._data.get("kind"), event._data.get("points"))

    def on_mention(question: str, event: gr.EventData) -> str:
        number = event._data.get("number")
        return f"{question} [{number}]".strip() if isinstance(number, int) else question

    def on_example(session: Session, event: gr.SelectData) -> tuple:
        session.start_example(examples[event.index])
        return *view(session), "\n".join(session.labels)

    def on_picture(session: Session, path: str | None) -> tuple:
        if path is not None:
            session.put(path)
        return *view(session), None

    def on_ask(session: Session, question: str, temperature: float, length: float, history: bool) -> Iterator[tuple]:
        settings, drawn = Settings(float(temperature), int(length), bool(history)), None
        for _ in ask(session, question, models, settings):
            now = (session.board.picture, list(session.board.marks), session.board.shown)
            yield view(session, now != drawn)
            drawn = now
        yield view(session)

    def on_rank(session: Session, labels: str) -> str:
        board = session.board
        try:
            marks = [board.marks[number] for number in board.drawn]
            ranked = models.rank(board.picture, [mark.box for mark in marks], labels.replace(",", "\n").splitlines())
        except DataError as error:
            return status_html(str(error))
        return ranking_html(list(zip((mark.number for mark in marks), ranked, strict=True)))

    def on_find(session: Session, phrase: str) -> tuple:
        try:
            ((box, score),) = models.find(session.board.picture, [phrase])
            number = session.board.answer(box, phrase.strip(), ENCODER)
        except DataError as error:
            session.status = str(error)
        else:
            session.status = (
                f"[{number}] is where the encoder finds it; the cosine of the phrase with what lies there is {score:.3f}."
            )
        return *view(session), status_html(session.status)

    def on_load(session: Session, device: str, bits: str) -> tuple:
        if not reloads:
            session.status = "The models stay where they are: only a page that this machine alone can open moves them."
        elif device not in devices() or bits not in BITS:
            session.status = f"The models stay where they are: there is no {device} here, but {', '.join(devices())}."
        else:
            models.load(device, BITS[bits])
            done = f"The models are on {device}, with {bits}."
            session.status = " ".join([*models.errors, models.encoder_error]).strip() or done
        return *view(session), alert()

    def alert() -> str:
        return "".join(f'<p role="alert"><b>{html.escape(error)}</b></p>' for error in models.errors)

    def save_chat(session: Session) -> dict:
        text = json.dumps(conversation(session), indent=1, ensure_ascii=False)
        return {"name": "conversation.json", "url": to_url(text.encode(), "application/json")}

    def save_picture(session: Session) -> dict:
        if session.board.picture is None:
            return {}
        shown = draw_marks(session.board.picture, (session.board.marks[number] for number in session.board.shown))
        return {"name": "picture.png", "url": to_url(encoded(shown), "image/png")}

    with gr.Blocks(title="Open CLOC", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(TITLE, elem_id="title")
        banner = gr.HTML(alert(), elem_id="alert")
        state, (_, shown, said, line, text) = gr.State(first, time_to_live=3600), view(first)
        with gr.Row():
            with gr.Column(scale=3 if len(names) > 1 else 1, min_width=320):
                board = gr.HTML(
                    shown,
                    html_template=BOARD,
                    js_on_load=(HERE / "board.js").read_text(),
                    apply_default_css=False,
                    elem_id="board",
                )
                status = gr.HTML(line, elem_id="status")
                with gr.Row():
                    undo_mark, save_png = (gr.Button(name, size="sm", min_width=80) for name in ("Undo mark", "Save picture"))
            with gr.Column(scale=2 if len(names) > 1 else 1, min_width=320), gr.Tabs():
                with gr.Tab("Chat"):
                    plain = {"latex_delimiters": [], "buttons": [], "placeholder": "Answers come here."}
                    chat = gr.Chatbot(said, height="min(420px, 56vh)", show_label=False, elem_id="chat", **plain)
                    with gr.Row(equal_height=True):
                        limits = {"show_label": False, "max_length": MAX_QUESTION}
                        question = gr.Textbox(text, placeholder="Where is ...?", scale=5, elem_id="question", **limits)
                        send = gr.Button("Ask", variant="primary", min_width=80)
                    with gr.Row():
                        names_of = ("Stop", "Undo", "Clear", "Save chat")
                        stop, undo, clear, save_json = (gr.Button(name, size="sm", min_width=60) for name in names_of)
                    with gr.Accordion("Settings", open=False):
                        temperature = gr.Slider(
                            0, 2, 0, step=0.1, label="Temperature", info="0 takes the likeliest word each time."
                        )
                        length = gr.Slider(8, MAX_ANSWER, 128, step=8, label="Longest answer, in tokens")
                        history = gr.Checkbox(models.long_memory, label="The model is given the earlier turns")
                        with gr.Row(visible=reloads):
                            device = gr.Dropdown(devices(), value=models.device, label="Device", info=told_of_devices())
                            weights = next(name for name, value in BITS.items() if value == models.bits)
                            bits = gr.Dropdown(list(BITS), value=weights, label="Language model", info="By bitsandbytes.")
                            reload = gr.Button("Load again", size="sm")
                with gr.Tab("Encoder alone"):
                    gr.Markdown("CLOC without a language model, on the same picture and marks.")
                    labels = gr.Textbox(
                        "\n".join(first.labels), label="Labels, one a line", lines=4, max_length=5000, elem_id="labels"
                    )
                    rank = gr.Button("Rank the labels for each mark", variant="primary")
                    ranking = gr.HTML(elem_id="ranking")
                    phrase = gr.Textbox(label="A phrase", placeholder="the red bus", max_length=MAX_QUESTION, elem_id="phrase")
                    find = gr.Button("Find its box", variant="primary")
                    found = gr.HTML(elem_id="found")
        picture, gallery = _pictures(examples)
        file = gr.JSON(visible=False)
        outputs = [state, board, chat, status, question]
        private = {"api_visibility": "private", "show_progress": "hidden"}
        shown_by = {"outputs": outputs, **private}
        page.load(alert, None, [banner], **private)  # every visitor sees how things are now
        picture.input(on_picture, [state, picture], [*outputs, picture], **private)
        board.mark(on_mark, [state, question], **shown_by)
        board.mention(on_mention, [question], [question], **private)
        gallery.select(on_example, [state], [*outputs, labels], **private)
        undo_mark.click(shows(Session.undo_mark), [state, question], **shown_by)
        undo.click(shows(Session.undo_turn), [state, question], **shown_by)
        gr.on([clear.click, chat.clear], shows(Session.clear), [state], **shown_by)
        stop.click(Session.stop, [state], queue=False, **private)
        gr.on([question.submit, send.click], on_ask, [state, question, temperature, length, history], **shown_by, **ONE)
        gr.on([rank.click], on_rank, [state, labels], [ranking], **private, **ONE)
        gr.on([phrase.submit, find.click], on_find, [state, phrase], [*outputs, found], **private, **ONE)
        reload.click(on_load, [state, device, bits], [*outputs, banner], **private, **ONE)
        save_json.click(save_chat, [state], [file], **private).then(None, [file], None, js=SAVE)
        save_png.click(save_picture, [state], [file], **private).then(None, [file], None, js=SAVE)
        add_api(models, point_reach, ONE)
    return page.queue(max_size=QUEUE, default_concurrency_limit=4)


def _pictures(examples: list[Example]) -> tuple[gr.Image, gr.Gallery]:
    """Where a picture comes in: by upload, paste or camera, or as one of the examples."""
    gr.Markdown("Another picture: one of these, or your own, which may be dropped or pasted anywhere.")
    small = [example.image.resize((3 * example.image.width, 3 * example.image.height)) for example in examples]
    plain = {"show_label": False, "buttons": []}
    with gr.Row():
        gallery = gr.Gallery(small, columns=4, height="auto", allow_preview=False, elem_id="examples", min_width=320, **plain)
        sources = ["upload", "clipboard", "webcam"]
        picture = gr.Image(sources=sources, height=260, elem_id="picture", min_width=320, **plain)
    # Gradio would decode an upload itself and fail in its own words; its check of where the file lies stays.
    picture.preprocess = lambda payload: payload and payload.path
    return picture, gallery


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Starts the page's server and returns; nothing is shared, and of the server's files only visitors' own are given out."""
    theme = gr.themes.Soft(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))  # no font from afar
    limits = {"max_file_size": MAX_BYTES, "state_session_capacity": SESSIONS, "share": False}
    look = {"theme": theme, "css": CSS, "footer_links": ["api"], "ssr_mode": False, "quiet": True}
    try:
        page.launch(server_name=host, server_port=port, prevent_thread_lock=True, **limits, **look)
    except OSError as error:
        raise DataError(f"{host}:{port} is in use or not of this machine; give another --port or --host") from error
