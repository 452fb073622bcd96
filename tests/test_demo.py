"""The chat of the demo without a browser: questions and answers on a tiny real model, talks, the encoder, the terminal."""

import gc
import io
import json
import random
import re
import sys
import weakref

import numpy as np
import pytest
import torch
from demo_fixtures import grey_chat, write_mllm
from PIL import Image

from demo import models as demo_models
from demo.app import WEIGHTS
from demo.board import MAX_QUESTION
from demo.drawing import colour
from demo.models import Models, Settings, load_chat
from demo.session import Session, ask, conversation
from demo.terminal import main as terminal
from demo.words import board_value, chip, messages, question_html, replies_html
from encoder.errors import DataError
from mllm.box_text import BoxCodec

SHORT = Settings(max_new_tokens=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mllm(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def models(folder, tiny_folder) -> Models:
    return Models([folder], tiny_folder)


@pytest.fixture()
def session() -> Session:
    return grey_chat()


def says(monkeypatch, models: Models, *texts: str) -> None:
    """The models say these, a word at a time, whatever they are asked; all else is as it is."""
    said = {}
    for speaker, text in zip(models.speakers, texts, strict=True):
        said[speaker.name] = text

    def stream(session, speaker, turn, asked, settings):
        yield from said[speaker.name].replace(" ", " \0").split("\0")
        yield speaker.chat.read(said[speaker.name], asked, session.board.picture)

    monkeypatch.setattr(models, "stream", stream)


def talk_of(session: Session, models: Models):
    ((talk, _),) = models._talks[session].values()
    return talk


def last(session: Session) -> str:
    return messages(session)[-1]["content"]


# --- questions and answers


def test_a_question_names_marks_and_the_model_gets_them(session, models, monkeypatch):
    session.draw("", "box", [(10, 5), (30, 25)])
    session.draw("", "box", [(40, 5), (60, 25)])
    steps = ask(session, "  Is [2] left of [1], or [2] right?  ", models, SHORT)
    next(steps)
    assert len(session.turns) == 1 and session.question == "" and "answering" in session.status
    list(steps)
    talk = talk_of(session, models)
    assert talk.image is session.board.picture
    # The square is 80 px wide with the picture in its middle half.
    assert talk.messages[0]["content"].endswith(
        "Is [500, 312, 750, 562] left of [125, 312, 375, 562], or [500, 312, 750, 562] right?"
    )
    assert [turn["role"] for turn in messages(session)] == ["user", "assistant"]
    assert colour(1) in messages(session)[0]["content"] and messages(session)[0]["content"].count(colour(2)) == 2


def test_boxes_of_an_answer_are_drawn_in_pixels_and_coloured_alike(session, models, monkeypatch):
    says(monkeypatch, models, "here [250, 375, 750, 625] & a big key [000, 250, 500, 750] [sic]")
    list(ask(session, "Where is it?", models, SHORT))
    for number, expected in {1: (20, 10, 60, 30), 2: (0, 0, 40, 40)}.items():
        assert np.allclose(session.board.marks[number].box, expected, atol=0.05)
        assert f'n{number}"' in last(session) and colour(number) in last(session)
    assert 'here <span class="chip n1"' in last(session) and ">[2] &amp; a big key</span>" in last(session)
    assert last(session).endswith(" [sic]</div>") and "not drawn" not in last(session)
    assert session.board.shown == [1, 2] and "[2]" in session.status
    assert [mark.phrase for mark in session.board.marks.values()] == ["it", "& a big key"]
    (pane,) = board_value(session.board, [models.speakers[0].name])["panes"]
    assert [mark["colour"] for mark in pane["marks"]] == [colour(1), colour(2)]
    says(monkeypatch, models, "nothing")
    list(ask(session, "What is [2]?", models, SHORT))
    assert session.board.shown == [2]  # an earlier answer's box makes room


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("[000, 250, 500, 750]", "<[1] the key>"),
        ("A cat [000, 250, 500, 750] and a dog [250, 375, 750, 625].", "<[1] A cat> and <[2] a dog>."),
        ("Two dogs: [000, 250, 500, 750], [250, 375, 750, 625]", "Two dogs: <[1]>, <[2]>"),
        ("There is a cat at [000, 250, 500, 750].", "There is <a cat> at <[1]>."),
    ],
)
def test_phrases_are_coloured_where_they_stand(said, shown, session, models, monkeypatch):
    says(monkeypatch, models, said)
    list(ask(session, "Where is the key?", models, SHORT))
    assert re.sub("<span[^>]*>([^<]*)</span>", r"<\1>", last(session)) == f'<div dir="auto">{shown}</div>'


def test_an_answer_is_seen_while_it_comes(session, models, monkeypatch):
    monkeypatch.setattr("demo.session.PAUSE", -1)
    says(monkeypatch, models, "a key [250, 375, 750, 625] and more")
    seen = [(last(session), list(session.board.marks)) for _ in ask(session, "Where is it?", models, SHORT)]
    assert len(seen) > 6 and "…" in seen[0][0] and ("<div" in seen[1][0] and "a " in seen[1][0])
    first = next(index for index, (_, marks) in enumerate(seen) if marks)
    assert 2 < first < len(seen) - 2 and "more" not in seen[first][0]  # the box is there before the answer ends


def test_boxes_of_location_tokens_are_drawn_and_escaped(session, models, monkeypatch):
    monkeypatch.setattr(models.speakers[0].chat.model, "codec", BoxCodec("loc_tokens"))
    says(monkeypatch, models, "<b> <loc_250><loc_375><loc_750><loc_625> [250, 375, 750, 625]")
    list(ask(session, "Where is it?", models, SHORT))
    assert np.allclose(session.board.marks[1].box, (20, 10, 60, 30), atol=0.05)
    assert "[1] &lt;b&gt;</span> [250, 375, 750, 625]" in last(session)


def test_an_answers_bad_box_says_why_and_an_empty_answer_is_said(session, models, monkeypatch):
    says(monkeypatch, models, "[700, 100, 200, 900] [000, 000, 500, 100]")
    list(ask(session, "Where is it?", models, SHORT))
    assert session.board.marks == {} and last(session).count("is not drawn") == 2
    assert "not left of" in last(session) and "padding" in last(session)
    says(monkeypatch, models, "")
    list(ask(session, "Where is it?", models, SHORT))
    assert "said nothing" in last(session)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("   ", "empty"),
        ("x" * (MAX_QUESTION + 1), f"{MAX_QUESTION + 1} characters"),
        ("What is [7]?", "no mark [7]"),
        ("<image> again?", "<image>"),
        ("What is <region:0>?", "<region:0>"),
        ("What is <region>?", "<region>"),
        ("stop </s> here", "</s>"),
    ],
)
def test_what_cannot_be_asked_gets_one_sentence(question, said, session, models):
    assert len(list(ask(session, question, models, SHORT))) == 1
    assert said in session.status and session.turns == [] and session.question == question.strip()


@pytest.mark.parametrize(
    "question", ["我在哪里？", "איפה הלב האדום?", "🐸" * 50, "a\x00b \ud800?", "**a** <b>&</b> ![](x) $$y$$"]
)
def test_any_script_can_be_asked_and_nothing_in_it_is_markup(question, session, models):
    list(ask(session, question, models, SHORT))
    content = messages(session)[0]["content"].removeprefix('<div dir="auto">').removesuffix("</div>")
    assert len(session.turns) == 1 and "<" not in content


def test_a_visitors_words_are_escaped_and_numbers_coloured():
    text = question_html("<b>what</b> is [1]?")
    assert "<b>" not in text and "&lt;b&gt;" in text and chip(1) in text
    assert "&quot;" in chip(1, title='"><script>') and "<script>" not in chip(1, title='"><script>')


def test_random_answers_never_break_the_chat(session, models, monkeypatch):
    rng = random.Random(0)
    for _ in range(100):
        says(monkeypatch, models, "".join(rng.choice("[]0123456789, .-<>&") for _ in range(40)))
        list(ask(session, "Where is it?", models, SHORT))
    assert all(mark.box[2] > mark.box[0] and mark.box[3] > mark.box[1] for mark in session.board.marks.values())


def test_a_models_own_failure_is_a_sentence_in_the_chat(session, models, monkeypatch):
    def stream(*arguments):
        yield "so far"
        raise torch.OutOfMemoryError("no memory\nis left")

    monkeypatch.setattr(models, "stream", stream)
    list(ask(session, "Where is it?", models, SHORT))
    assert "so far" in last(session) and "no memory is left" in last(session)


# --- several turns


def test_stop_keeps_what_was_said_and_the_chat_goes_on(session, models, monkeypatch):
    monkeypatch.setattr("demo.session.PAUSE", -1)
    steps = ask(session, "Where is the red square?", models, Settings(max_new_tokens=200))
    for _ in range(4):
        next(steps)
    session.stop()
    list(steps)
    talk = talk_of(session, models)
    assert "stopped" in session.status and talk.messages[-1]["content"] == session.turns[0].replies[0].answer.text
    list(ask(session, "Where is it?", models, SHORT))
    assert len(session.turns) == 2 and session.turns[1].replies[0].done


def test_the_picture_is_read_once_in_a_chat_and_for_the_encoder_too(session):
    shipped = Models([WEIGHTS / "mllm_cloc"], WEIGHTS / "cloc")
    tower, runs = shipped.speakers[0].chat.model.model.model.vision_tower, []
    hook = tower.embeddings.register_forward_hook(lambda *a: runs.append(1))
    for question in ("Where is the bus?", "Where is the key?"):
        list(ask(session, question, shipped, SHORT))
    session.draw("", "box", [(10, 5), (30, 25)])
    list(ask(session, "What is [1]?", shipped, Settings(max_new_tokens=8, history=True)))
    ranked = shipped.rank(session.board.picture, [session.board.marks[1].box], ["bus", "key"])
    found = shipped.find(session.board.picture, ["bus"])
    assert len(runs) == 1 and shipped.predictor.model.vision_model is tower
    hook.remove()
    alone = demo_models.RegionPredictor.from_pretrained(WEIGHTS / "cloc")
    alone.set_image(session.board.picture)
    _, cosines = alone.classify_boxes([session.board.marks[1].box], ["bus", "key"])
    by_label = {label: cosine for label, cosine, _ in ranked[0]}
    assert np.allclose([by_label["bus"], by_label["key"]], cosines[0], atol=1e-6)
    boxes, scores = alone.ground(["bus"])
    assert np.allclose(found[0][0], boxes[0], atol=1e-4) and found[0][1] == pytest.approx(float(scores[0]), abs=1e-6)


def test_earlier_turns_are_given_only_where_they_are_wanted(session, models):
    for _ in range(2):
        list(ask(session, "Where is the red square?", models, SHORT))
    talk = talk_of(session, models)
    assert len(talk.messages) == 2
    list(ask(session, "And where?", models, Settings(max_new_tokens=8, history=True)))
    assert len(talk.messages) == 4 and "red square" in talk.messages[0]["content"]
    session.undo_turn("")
    assert session.question == "And where?" and len(session.turns) == 2
    list(ask(session, "And then?", models, Settings(max_new_tokens=8, history=True)))
    assert len(talk.messages) == 4 and "And where?" not in str(talk.messages)
    session.clear()
    list(ask(session, "And now?", models, Settings(max_new_tokens=8, history=True)))
    assert talk_of(session, models) is talk and len(talk.messages) == 2  # the picture stays read
    assert not models.long_memory


def test_earlier_turns_that_no_longer_fit_are_left_out(session, models):
    limit = models.speakers[0].chat.model.model.config.text_config.max_position_embeddings
    settings = Settings(max_new_tokens=limit // 3, history=True)
    for _ in range(4):
        list(ask(session, "Where is the red square?", models, settings))
    assert len(session.turns) == 4 and not any(turn.replies[0].error for turn in session.turns)


def test_undo_takes_back_a_turn_with_its_boxes(session, models, monkeypatch):
    session.draw("", "box", [(10, 5), (30, 25)])
    says(monkeypatch, models, "a key [250, 375, 750, 625]")
    list(ask(session, "What is [1]?", models, SHORT))
    assert list(session.board.marks) == [1, 2]
    session.undo_turn("typed meanwhile")
    assert list(session.board.marks) == [1] and session.turns == [] and session.question == "What is [1]?"
    session.undo_turn("typed")
    assert "no question" in session.status and session.question == "typed"
    session.clear()
    assert session.board.marks == {} and session.board.picture is not None


def test_asking_without_a_picture_and_while_another_picture_comes(session, models):
    steps = ask(session, "Where is the red square?", models, SHORT)
    next(steps)
    session.start(Image.new("RGB", (10, 10)))
    list(steps)
    assert session.turns == [] and session.board.marks == {}  # the answer belonged to the chat before
    steps = ask(session, "Where is the red square?", models, SHORT)
    next(steps)
    session.undo_turn("")
    list(steps)
    assert session.turns == [] and session.board.marks == {} and "taken back" in session.status
    session.start()
    list(ask(session, "Where is the red square?", models, SHORT))
    assert "no picture" in session.status


def test_talks_that_others_have_pushed_out_are_read_again(models, monkeypatch):
    monkeypatch.setattr(demo_models, "KEPT_TALKS", 1)
    one, two = grey_chat(), grey_chat()
    for session in (one, two, one):
        list(ask(session, "Where is the red square?", models, SHORT))
    first, second = talk_of(one, models), talk_of(two, models)
    assert second._state is None and first._state is not None
    assert one.turns[0].replies[0].answer == one.turns[1].replies[0].answer == two.turns[0].replies[0].answer


def test_a_warm_answer_differs_from_draw_to_draw(session, models):
    texts = set()
    for seed in range(3):
        torch.manual_seed(seed)
        list(ask(session, "Where is the red square?", models, Settings(temperature=2.0, max_new_tokens=16)))
        texts.add(session.turns[-1].replies[0].answer.text)
    assert len(texts) == 3


# --- two models, and what fails


def test_two_models_answer_side_by_side_and_both_are_drawn(session, folder, tiny_folder, monkeypatch):
    both = Models([folder, folder / ".." / "mllm"], tiny_folder)
    names = [speaker.name for speaker in both.speakers]
    assert len(set(names)) == 2
    texts = ["a key [250, 375, 750, 625]", "[000, 250, 500, 750] there"]
    says(monkeypatch, both, *texts)
    list(ask(session, "Where is the key?", both, SHORT))
    assert [reply.answer.text for reply in session.turns[0].replies] == texts
    panes = board_value(session.board, names)["panes"]
    assert [len(pane["marks"]) for pane in panes] == [1, 1]
    assert [pane["marks"][0]["box"][2] for pane in panes] == pytest.approx([60.04, 40.04], abs=0.1)
    assert all(name in last(session) for name in names) and 'class="pair"' in last(session)


def test_models_that_fail_to_load_are_a_sentence_each_and_the_rest_works(tmp_path, folder, session):
    (tmp_path / "config.json").write_text("{")
    models = Models([tmp_path, folder, tmp_path / "none"], tmp_path)
    assert [speaker.chat is None for speaker in models.speakers] == [True, False, True]
    assert "is not JSON" in models.errors[0] and "make quickstart" in models.errors[1] and "\n" not in "".join(models.errors)
    list(ask(session, "Where is it?", models, SHORT))
    assert [reply.by for reply in session.turns[0].replies] == ["mllm"]
    with pytest.raises(DataError, match="encoder cannot be used"):
        models.rank(session.board.picture, [(1, 1, 9, 9)], ["a"])
    none = Models([tmp_path], tmp_path)
    list(ask(session, "Where is it?", none, SHORT))
    assert "cannot be used" in session.status and session.question == "Where is it?"
    with pytest.raises(DataError, match="make quickstart.*make reproduce"):
        load_chat(tmp_path / "none", "cpu", None)


def test_models_are_loaded_again_in_four_bits_and_the_chat_goes_on(folder, tiny_folder, session):
    again = Models([folder], tiny_folder)
    list(ask(session, "Where is it?", again, SHORT))
    before = weakref.ref(again.speakers[0].chat)
    again.load("cpu", 4)
    gc.collect()
    assert before() is None  # no visitor's talk keeps the old model in memory
    language_model = again.speakers[0].chat.model.model.model.language_model
    assert any(type(module).__name__ == "Linear4bit" for module in language_model.modules())
    list(ask(session, "Where is it?", again, SHORT))
    assert len(session.turns) == 2 and session.turns[1].replies[0].done and not session.turns[1].replies[0].error


def test_what_the_encoder_cannot_do_is_one_sentence(models, session):
    picture = session.board.picture
    for boxes, labels, said in (
        ([], ["a"], "no mark"),
        ([(1, 1, 9, 9)], [" ", ""], "no label"),
        ([(1, 1, 9, 9)], ["x"] * 101, ""),
    ):
        if said:
            with pytest.raises(DataError, match=said):
                models.rank(picture, boxes, labels)
        else:
            assert len(models.rank(picture, boxes, labels)[0]) == 1  # the same label once
    with pytest.raises(DataError, match="at most 100"):
        models.find(picture, [str(number) for number in range(101)])
    with pytest.raises(DataError, match="no picture"):
        models.find(None, ["a"])
    (row,) = models.rank(picture, [(1, 1, 30, 30)], ["red square", "blue bar", "green dot"])
    assert sum(share for _, _, share in row) == pytest.approx(1) and [c for _, c, _ in row] == sorted(
        (c for _, c, _ in row), reverse=True
    )


# --- downloads and the terminal


def test_the_conversation_as_a_record(session, models, monkeypatch):
    session.draw("", "point", [(20, 20)])
    says(monkeypatch, models, "a key [250, 375, 750, 625] [700, 100, 200, 900]")
    list(ask(session, "What is [1]? 我", models, SHORT))
    record = json.loads(json.dumps(conversation(session)))
    assert record["picture"] == {"width": 80, "height": 40}
    assert record["marks"][0] == {"number": 1, "kind": "point", "box": [8, 8, 32, 32], "points": [[20, 20]]}
    (turn,) = record["turns"]
    (answer,) = turn["answers"]
    assert (turn["question"], turn["marks"], answer["by"]) == ("What is [1]? 我", [1], "mllm")
    assert answer["boxes"] == [{"mark": 2, "box": pytest.approx([20.04, 10.04, 60.04, 30.04], abs=0.1), "phrase": "a key"}]
    assert len(answer["unread"]) == 1 and answer["text"].startswith("a key [250")
    assert replies_html(session.turns[0].replies, session.board).count("n2") == 1


def test_the_terminal_marks_asks_saves_and_lives_on(folder, tiny_folder, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (80, 40), (120, 120, 120)).save(tmp_path / "grey.png")
    lines = [
        "box 10 5 30 25",
        "box 1 2",
        "point 90 20",
        "What is [1] and [2]?",
        "What is [9]?",
        "picture none.png",
        "undo",
        "x" * 500,
    ]
    lines += ["Where is it?", f"save {tmp_path / 'chat.json'}", "clear", "quit", "never read"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    out = ["--out", str(tmp_path / "out.png"), "--encoder", str(tiny_folder), "--max-new-tokens", "16"]
    monkeypatch.setattr(sys, "argv", ["terminal.py", str(tmp_path / "grey.png"), "--model", str(folder), *out])
    terminal()
    said = capsys.readouterr().out
    assert "[1] 10.0 5.0 30.0 25.0 px" in said and "[2] 68.0 8.0 80.0 32.0 px" in said
    for sentence in ("x1 y1 x2 y2", "no mark [9]", "cannot be read", "500 characters", "never" * 0):
        assert sentence in said
    assert Image.open(tmp_path / "out.png").size == (640, 320)
    record = json.loads((tmp_path / "chat.json").read_text())
    assert [turn["question"] for turn in record["turns"]] == ["Where is it?"] and len(record["marks"]) >= 2
