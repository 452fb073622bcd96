"""The chat in Python on the shipped MLLM: batches, streams and talks against the stock forward, one argmax at a time."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from mllm_fixtures import recipe, write_conversations
from PIL import Image
from transformers import MistralConfig, MistralForCausalLM

from encoder.data.pictures import load_library
from encoder.data.prompts import GROUNDING_QUESTION, REFERRING_QUESTION
from encoder.data.scenes import PictureLibrary, SceneConfig, draw_scene
from encoder.errors import DataError
from mllm import Answer, GroundingChat
from mllm.chat import phrases_of
from mllm.config import MllmConfig
from mllm.generation import GroundingModel
from mllm.model import build_mllm, join

MLLM = Path(__file__).parents[1] / "weights" / "mllm_cloc"


@pytest.fixture(scope="module")
def chat():
    return GroundingChat.from_pretrained(MLLM)


@pytest.fixture(scope="module")
def asked():
    """40 questions of both kinds on 10 scenes: pictures, questions, boxes."""
    library = PictureLibrary(load_library("base", seed=0)[0])
    images, questions, regions = [], [], []
    for index in range(10):
        scene = draw_scene(SceneConfig(), library, seed=5, index=index, split="chat")
        for number in range(4):
            box_index, expression, _ = scene.expressions[number % len(scene.expressions)]
            where = number % 2 == 0
            images.append(scene.image)
            questions.append(GROUNDING_QUESTION.format(expression) if where else REFERRING_QUESTION.format("<region>"))
            regions.append([] if where else [tuple(scene.objects[box_index].box)])
    return images, questions, regions


def naive(model: GroundingModel, image: Image.Image, messages: list[dict], max_new_tokens: int = 24, **more) -> str:
    """The answer to a whole conversation by the stock forward, without a cache."""
    ids = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    marks = [model.image_token_id] * model.model.config.image_seq_length
    ids = [i for token in ids for i in (marks if token == model.image_token_id else [token])]
    pixels, new = model.settings.image.pixels([image]), []
    with torch.no_grad():
        while len(new) < max_new_tokens:
            new.append(int(model.model(input_ids=torch.tensor([ids + new]), pixel_values=pixels, **more).logits[0, -1].argmax()))
            if new[-1] == model.tokenizer.eos_token_id:
                break
    return model.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_forty_answers_are_the_same_one_by_one_in_batches_and_as_a_stream(chat, asked):
    images, questions, regions = asked
    alone = chat.ask_many(images, questions, regions, batch_size=1, max_new_tokens=24)
    with pytest.raises(DataError, match=f"{len(images)} pictures, {len(images) - 1} questions, .* as many of each"):
        chat.ask_many(images, questions[1:], regions)
    assert len(alone) == 40 and len({answer.text for answer in alone}) > 10
    assert chat.ask_many(images, questions, regions, batch_size=8, max_new_tokens=24) == alone
    for image, question, boxes, answer in list(zip(images, questions, regions, alone, strict=True))[:12]:
        *pieces, last = chat.stream(image, question, boxes, max_new_tokens=24)
        assert last == answer and "".join(pieces) == answer.text
        assert len(pieces) >= 15 or not answer.boxes  # a box is 17 tokens
    assert chat.ask(images[1], questions[1], regions[1], max_new_tokens=24) == alone[1]


def test_boxes_are_in_pixels_with_the_words_they_belong_to(chat, asked):
    images, questions, regions = asked
    answers = chat.ask_many(images[::2], questions[::2], max_new_tokens=24)
    found = 0
    for image, question, answer in zip(images[::2], questions[::2], answers, strict=True):
        assert tuple(answer.boxes) == chat.model.decode_boxes(answer.text, image.size)
        assert answer.phrases == [question.removeprefix("Where is ").removesuffix("?")] * len(answer.boxes)
        for (x1, y1, x2, y2), (start, end) in zip(answer.boxes, answer.spans, strict=True):
            assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height
            assert answer.text[start:end].startswith("[") and answer.text[start:end].endswith("]")
            found += 1
    assert found > 15
    outside = chat.read("[100, 000, 300, 100] and [900, 100, 100, 300]", "Where?", Image.new("RGB", (80, 40)))
    assert outside.boxes == outside.phrases == [] and len(outside.unread) == 2
    mixed = chat.read("A [900, 100, 100, 300] and [250, 375, 750, 625]", "Where is it?", Image.new("RGB", (80, 40)))
    assert (mixed.phrases, mixed.spans, len(mixed.unread)) == (["A"], [(27, 47)], 1)
    assert outside.unread[0].endswith("outside the picture") and "left edge" in outside.unread[1]


@pytest.mark.parametrize(
    "text, phrases",
    [
        ("[000, 000, 100, 100]", ["the red bus"]),
        ("A cat [000, 000, 100, 100] and a brown dog [200, 200, 300, 300].", ["A cat", "a brown dog"]),
        ("Two dogs: [000, 000, 100, 100], [200, 200, 300, 300]", ["the red bus", "the red bus"]),
        ("two dogs [000, 000, 100, 100], [200, 200, 300, 300]; a cat [000, 000, 100, 100]", ["two dogs", "two dogs", "a cat"]),
        ("There is a cat at [000, 000, 100, 100] on the mat [200, 200, 300, 300]", ["a cat", "the mat"]),
        ("It is at [000, 000, 100, 100]. The mat is at [200, 200, 300, 300].", ["the red bus", "The mat"]),
        ("nothing", []),
    ],
)
def test_phrases(chat, text, phrases):
    spans = chat.model.codec.spans(text)
    assert phrases_of(text, spans, "Where is the red bus?") == phrases


def test_a_talk_is_the_whole_conversation_and_reads_the_picture_once(chat, asked, monkeypatch):
    images, questions, regions = asked
    talk, seen = chat.talk(images[0]), []
    real = chat.model.model.model.vision_tower.forward
    monkeypatch.setattr(chat.model.model.model.vision_tower, "forward", lambda *a, **k: (seen.append(1), real(*a, **k))[1])
    for turn in range(4):
        answer = talk.ask(questions[turn], regions[turn], max_new_tokens=24)
        assert isinstance(answer, Answer) and answer.text == talk.messages[-1]["content"]
        assert len(talk.messages) == 2 * turn + 2
    assert len(seen) == 1
    for turn in range(4):
        said = talk.messages[2 * turn + 1]["content"]
        assert said == naive(chat.model, images[0], talk.messages[: 2 * turn + 1]), turn
    assert "[" in talk.messages[2]["content"]  # a box in a later question


def test_an_answer_can_be_broken_off(chat, asked):
    images, questions, regions = asked
    talk, other = chat.talk(images[4]), chat.talk(images[4])
    stream = talk.stream(questions[4], max_new_tokens=24)
    first = next(stream) + next(stream)
    stream.close()
    assert talk.messages[-1] == {"role": "assistant", "content": first}
    whole = other.ask(questions[4], max_new_tokens=24).text
    assert whole.startswith(first) and len(first) < len(whole)
    after = talk.ask(questions[5], regions[5], max_new_tokens=24).text
    assert after == naive(chat.model, images[4], talk.messages[:-1])

    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stop

    hook = chat.model.model.lm_head.register_forward_pre_hook(stop)  # as Ctrl-C in the middle of a run
    with pytest.raises(Stop):
        talk.ask(questions[6])
    hook.remove()
    assert talk.ask(questions[7], regions[7], max_new_tokens=24).text == naive(chat.model, images[4], talk.messages[:-1])


def test_a_talk_under_a_sliding_window(chat, asked):
    images, questions, regions = asked
    llama = chat.model.model.config.text_config
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {key: getattr(llama, key) for key in fields}
    torch.manual_seed(3)
    llm = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=30))
    joined = join(chat.model.model.model.vision_tower, llm, chat.model.tokenizer, -2)
    talk = GroundingChat(GroundingModel(joined, chat.model.tokenizer, chat.model.settings)).talk(images[0])
    for turn in range(2):
        text = talk.ask(questions[turn], regions[turn], max_new_tokens=6).text
        assert text == naive(talk._model, images[0], talk.messages[:-1], 6)


def test_a_talk_of_a_model_with_region_tokens(tiny_folder, tmp_path):
    """Points and boxes named in several turns, their tokens in their places."""
    write_conversations(tmp_path, 3)
    mllm = build_mllm(MllmConfig(**recipe(tmp_path, tower=str(tiny_folder), region_tokens="prompter", max_length=400)))
    for name, parameter in mllm.model.named_parameters():
        if "language_model.layers" in name and parameter.ndim > 1:
            parameter.data *= 8  # answers then depend on question and picture
    head, config = mllm.model.lm_head.weight.data, mllm.model.config
    head[[config.image_token_id, config.region_token_id]] = head[mllm.tokenizer.eos_token_id].clone()  # marks are never said
    chat = GroundingChat(GroundingModel(mllm.model, mllm.tokenizer, mllm.settings))
    image = Image.open(next((tmp_path / "images").glob("*.png"))).convert("RGB")
    turns = [
        ("Is <region> in <region>?", [(1, 2, 20, 30), {"point": [20, 20]}]),
        ("Where?", []),
        ("What is <region>?", [(5, 5, 30, 30)]),
    ]
    talk = chat.talk(image)
    for number, (question, regions) in enumerate(turns):
        text = talk.ask(question, regions, max_new_tokens=8).text
        questions, named = zip(*turns[: number + 1], strict=True)
        more = chat.model.region_features(list(questions), [image] * len(questions), list(named))
        assert len(more["region_features"]) == (2, 2, 3)[number]
        assert text == naive(chat.model, image, talk.messages[:-1], 8, **more)
    assert chat.ask(image, *turns[0], max_new_tokens=8).text == talk.messages[1]["content"]


def test_placed_by_a_map_and_in_four_bits(chat, asked):
    images, questions, regions = (part[:4] for part in asked)
    expected = chat.ask_many(images, questions, regions, max_new_tokens=24)
    for device_map in ("auto", {"": "cpu"}):
        placed = GroundingChat.from_pretrained(MLLM, device_map=device_map)
        assert placed.ask_many(images, questions, regions, max_new_tokens=24) == expected
    low = GroundingChat.from_pretrained(MLLM, bits=4)
    layers = {name: m for name, m in low.model.model.model.language_model.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == 7 * chat.model.model.config.text_config.num_hidden_layers
    # The same as the full model with the rounded weights in it.
    rounded = GroundingChat.from_pretrained(MLLM)
    for name, layer in layers.items():
        plain = rounded.model.model.model.language_model.get_submodule(name)
        plain.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(plain.weight.dtype)
    got = low.ask_many(images, questions, regions, max_new_tokens=24)
    assert got == rounded.ask_many(images, questions, regions, max_new_tokens=24)
    with pytest.raises(DataError, match="bits is 3; choose 4, 8 or None"):
        GroundingChat.from_pretrained(MLLM, bits=3)


def test_what_cannot_be_asked_says_so(chat, asked):
    images, questions, _ = asked
    with pytest.raises(DataError, match="holds the mark <image>"):
        chat.talk(images[0]).ask("What is <image>?")
    with pytest.raises(DataError, match="<region:0>, but 0 "):
        chat.ask(images[0], "What is <region>?")
    with pytest.raises(DataError, match=r"region 0 is \(4, 8\); give a box x1, y1, x2, y2 in pixels"):
        chat.ask(images[0], "What is <region>?", [(4, 8)])
    with pytest.raises(DataError, match="the picture of question 'What is red\\?' is a NoneType; give a PIL image"):
        chat.ask(None, "What is red?")
    talk = chat.talk(images[0])
    with pytest.raises(DataError, match="the language model reads 512; begin a new talk"):
        talk.ask(questions[0], max_new_tokens=500)
    assert talk.messages == []
