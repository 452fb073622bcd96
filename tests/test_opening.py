"""Stock LLaVA folders opened as they are, against stock transformers' own processor and generate; and folders that are none."""

import json
import os
import runpy
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import pytest
import sentencepiece
import torch
from mllm_fixtures import recipe, write_conversations
from PIL import Image
from safetensors.torch import load_file
from stock_fixtures import SIZE, SYSTEM, StockReference, pictures, write_stock

from demo import models as demo_models
from demo.models import Models, Settings, count_parameters, load_chat
from demo.session import Session, ask
from encoder.data.prompts import GROUNDING_QUESTION
from encoder.errors import DataError
from eval.answering import load_answerer
from eval.predictions import Target
from mllm import training
from mllm.chat import GroundingChat
from mllm.checkpoint import load_mllm
from mllm.config import MllmConfig
from mllm.model import build_mllm
from mllm.opening import local_folder, read_mllm
from mllm.templates import TEMPLATES

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_checkpoint.py"
KINDS = ("llava", "llava_next")
QUESTIONS = ("Where is the red square?", "What is <region>?", "Is <region> left of the blue one?")
BOX = (7.0, 11.0, 29.0, 38.0)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    return {kind: write_stock(folder / kind, kind, seed) for seed, kind in enumerate(KINDS)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    images = pictures(tmp_path_factory.mktemp("pictures"))
    assert {(w > h) - (w < h) for w, h in (image.size for image in images)} == {-1, 0, 1}
    return images


def padded_box(width: int, height: int, box: Sequence[float] = BOX) -> str:
    """A box as LLaVA's data write it: of the picture padded to a square around its middle."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]".format(*((v + o) / side for v, o in zip(box, (left, top) * 2, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_stock_transformers(stock, images, kind):
    before = {path: path.stat().st_mtime_ns for path in stock[kind].iterdir()}
    chat, reference = GroundingChat.from_pretrained(stock[kind]), StockReference(stock[kind])
    assert {path: path.stat().st_mtime_ns for path in stock[kind].iterdir()} == before
    asked = [(image, question) for image in images for question in QUESTIONS]
    regions = [[BOX] * ("<region>" in question) for _, question in asked]
    expected = [reference.answer(i, q.replace("<region>", padded_box(*i.size)), 12) for i, q in asked]
    assert len(set(expected)) > len(expected) // 2  # answers depend on picture and question
    for (image, question), boxes, text in zip(asked, regions, expected, strict=True):
        assert chat.ask(image, question, boxes, max_new_tokens=12).text == text
        assert chat.talk(image).ask(question, boxes, max_new_tokens=12).text == text
    many = chat.ask_many(*map(list, zip(*asked, strict=True)), regions, max_new_tokens=12)
    assert [answer.text for answer in many] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_of_answers_lie_in_the_padded_square(stock, images, kind):
    """With tiles too. Two decimals of the longer side are how near a box comes back."""
    chat = GroundingChat.from_pretrained(stock[kind])
    for image in images:
        answer = chat.read(f"It is at {padded_box(*image.size)}.", "Where is it?", image)
        assert answer.boxes == [pytest.approx(BOX, abs=0.005 * max(image.size) + 1e-6)]
    wide = Image.new("RGB", (60, 30))
    assert chat.read("[0.00, 0.00, 1.00, 0.20]", "", wide).unread == [
        "[0.00, 0.00, 1.00, 0.20]: the box lies in the padding, outside the picture"
    ]


def test_settings_are_read_from_the_folder(stock, tmp_path):
    tokenizer, settings = read_mllm(stock["llava"])
    assert (settings.codec, settings.template, settings.feature_layer, settings.dtype) == ("float2", "vicuna_v1", -2, "float16")
    assert (settings.image.mode, settings.image.frame, settings.image.size) == ("pad_first", "pad_first", SIZE)
    tiles = read_mllm(stock["llava_next"])[1].image
    assert (tiles.mode, tiles.frame, tiles.tile_grids[0]) == ("anyres", "pad_first", (1, 2))
    assert load_mllm(stock["llava"])[0].config.image_seq_length == 25  # its config.json has the default of 576
    parameters = sum(value.numel() for path in stock["llava"].glob("*.safetensors") for value in load_file(path).values())
    assert parameters <= count_parameters(stock["llava"]) < 1.1 * parameters  # files have headers
    # As transformers 5 saves a processor, and without its files; a tower that no crop comes before is squashed.
    folder = shutil.copytree(stock["llava"], tmp_path / "folder")
    values = json.loads((folder / "preprocessor_config.json").read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert read_mllm(folder)[1].image.mean == (0.1, 0.2, 0.3)
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {**values, "do_center_crop": False}}))
    assert read_mllm(folder)[1].image.mode == "squash"
    (folder / "processor_config.json").unlink()
    assert read_mllm(folder)[1].image == settings.image


@pytest.mark.parametrize("name", ["simple", "vicuna_v1", "llama_2", "llama_3", "chatml", "mistral", "gemma"])
def test_the_chat_template_is_known_by_what_it_renders(stock, tmp_path, name):
    """As a processor's template that takes a list of parts, and that puts spaces elsewhere and leaves the ends of texts out."""
    folder = shutil.copytree(stock["llava"], tmp_path / "folder")
    theirs = TEMPLATES[name].replace("eos_token", "''").replace("{% generation %}", "").replace("{% endgeneration %}", " ")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": theirs}))
    if name == "mistral":  # which of two that look alike, the language model tells
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"text_config": {"model_type": "mistral"}}))
    assert read_mllm(folder)[1].template == ("vicuna_v1" if name == "simple" else name)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['role'] }}?"}))
    with pytest.raises(DataError, match="is none that is known here; make an MLLM folder with .* --template NAME"):
        read_mllm(folder)
    assert read_mllm(folder, name)[1].template == name
    (folder / "chat_template.json").unlink()
    assert read_mllm(folder)[1].template == "vicuna_v1"


@pytest.mark.parametrize("bits", [4, 8])
def test_low_bits_come_while_loading_and_are_those_of_afterwards(stock, images, bits, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from mllm.lora import quantize

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # `quantize` would go there
    low, after = (GroundingChat.from_pretrained(stock["llava"], bits=given) for given in (bits, None))
    quantize(after.model.model.model.language_model, bits, torch.float16)
    mine, theirs = (chat.model.model.state_dict() for chat in (low, after))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
    assert low.model.model.lm_head.weight.dtype == torch.float32
    for image in images[:2]:
        texts = [chat.ask(image, QUESTIONS[1], [BOX], max_new_tokens=8).text for chat in (low, after)]
        assert texts[0] == texts[1]


def convert(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT))["main"]()


def test_the_llava_repositorys_layout_has_its_command(stock, images, tmp_path, monkeypatch):
    """A stock folder in that layout, and back by the very command of the sentence, answers as before."""
    convert(monkeypatch, "--to", "llava", stock["llava"], tmp_path / "llava")
    with pytest.raises(DataError, match="is in the llava repository's own layout") as caught:
        GroundingChat.from_pretrained(tmp_path / "llava")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "mm_projector.bin").touch()
    shutil.copy(tmp_path / "llava" / "config.json", tmp_path / "part")
    with pytest.raises(DataError, match="part OUT --tower CLIP --llm LLM`"):
        GroundingChat.from_pretrained(tmp_path / "part")
    command = str(caught.value).split("`")[1].replace("OUT", str(tmp_path / "out"))
    words = shlex.split(command.replace(" CLIP", f" {tmp_path / 'llava' / 'vision_tower'}"))
    assert words[:2] == ["python", "scripts/convert_checkpoint.py"]
    convert(monkeypatch, *words[2:])
    before, again = GroundingChat.from_pretrained(stock["llava"]), GroundingChat.from_pretrained(tmp_path / "out")
    assert (before.model.settings.image, before.model.settings.codec) == (again.model.settings.image, again.model.settings.codec)
    for image in images:
        texts = [chat.ask(image, QUESTIONS[1], [BOX], max_new_tokens=12).text for chat in (before, again)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_folder_becomes_an_mllm_folder(stock, images, tmp_path, monkeypatch, kind):
    convert(monkeypatch, "--to", "mllm", stock[kind], tmp_path / "out")
    before, again = GroundingChat.from_pretrained(stock[kind]), GroundingChat.from_pretrained(tmp_path / "out")
    assert again.model.settings.image == before.model.settings.image and again.model.settings.tower_hash
    for image in images[:3]:
        texts = [chat.ask(image, QUESTIONS[0], max_new_tokens=12).text for chat in (before, again)]
        assert texts[0] == texts[1]
    with pytest.raises(DataError, match="with its tower and language model in it; leave --tower and --llm out"):
        convert(monkeypatch, "--to", "mllm", stock[kind], tmp_path / "none", "--tower", "x")


def test_what_is_no_llava_is_one_sentence(stock, tmp_path):
    for values, said in (
        (
            {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
            "holds a qwen2_5_vl .*name a",
        ),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "language model alone learns to see with .*--llm and"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "vision encoder alone is for --encoder"),
        ({}, "holds a None, which is no LLaVA"),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "the vision tower is a pixtral; a LLaVA on CLIP"),
        ({"model_type": "llava", "vision_config": {"model_type": "nothing"}}, "is not of a llava"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(DataError, match=said) as caught:
            GroundingChat.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        GroundingChat.from_pretrained(tmp_path)
    folder = shutil.copytree(stock["llava"], tmp_path / "folder")
    (folder / next(folder.glob("model-0*2-of*")).name).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        GroundingChat.from_pretrained(folder)
    with pytest.raises(DataError, match="image_grid_pinpoints .* are no multiples of the tower's 40 px"):
        folder = shutil.copytree(stock["llava_next"], tmp_path / "next")
        values = json.loads((folder / "config.json").read_text()) | {"image_grid_pinpoints": [[40, 90]]}
        (folder / "config.json").write_text(json.dumps(values))
        GroundingChat.from_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="the tokenizer of .* cannot be read"):
        GroundingChat.from_pretrained(folder)


def test_a_name_of_the_hub(stock, tmp_path, monkeypatch):
    fetched = []

    def give(name, allow_patterns):
        fetched.append(name)
        assert not {"*.py", "*.bin", "*"} & set(allow_patterns)
        return str(stock["llava"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert read_mllm(local_folder("someone/llava-1.5-7b-hf"))[1].codec == "float2" and fetched == ["someone/llava-1.5-7b-hf"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(DataError, match="MLLM folder runs/mllm does not exist"):  # a folder that is missed, and no name
        GroundingChat.from_pretrained("runs/mllm")
    assert len(fetched) == 1
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="someone/no-model is no folder here, and the model hub did not give it .* a network"):
        GroundingChat.from_pretrained("someone/no-model")


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_stock_folder(stock, images, tmp_path, kind):
    write_conversations(tmp_path, 4)
    fields = {"train": ["projector"], "max_length": 600, "max_steps": 2, "save_every": 0}
    config = MllmConfig(**recipe(tmp_path, model=str(stock[kind]), **fields))
    row = training.read_dataset(config, build_mllm(config), config.data)[0]
    chat = GroundingChat.from_pretrained(training.train(config))
    before, after = read_mllm(stock[kind])[1], chat.model.settings
    assert (after.codec, after.image, after.template) == (before.codec, before.image, before.template)
    assert chat.ask(images[0], QUESTIONS[1], [BOX], max_new_tokens=4).text is not None
    record = json.loads((tmp_path / "conversations_0.json").read_text())[0]
    size = record["width"], record["height"]
    assert size[0] != size[1]
    assert padded_box(*size, record["regions"][0]["box"]) in chat.model.tokenizer.decode(row.ids)


def test_four_bits_in_bfloat16_answer_as_in_float32(monkeypatch):
    """By the processor's own kernel where it has one; layers of sizes that it cannot take keep the plain way."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes.functional import has_avx512bf16

    from mllm.lora import choose_kernels, quantize

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # of the processor
    torch.manual_seed(0)
    weights = [torch.randn(out, given) for given, out in ((128, 64), (96, 64), (128, 40))]
    for weight in weights:
        short, long = torch.randn(3, weight.shape[1]), torch.randn(70, weight.shape[1])
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            layers = torch.nn.Sequential(torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=dtype)).eval()
            layers[0].weight.data = weight.to(dtype)
            quantize(layers, 4, torch.bfloat16)
            if dtype == torch.bfloat16:
                layers[0].support_avx512bf16_for_cpu = has_avx512bf16()
                choose_kernels(layers, fast=True)
            packed = []
            with torch.inference_mode():
                for x in (long, short, long):
                    results.append(layers(x.to(dtype)).float())
                    packed.append(getattr(layers[0].weight.quant_state, "packing_format_for_cpu", False))
        for one, two in zip(results[:3], results[3:], strict=True):
            torch.testing.assert_close(one, two, rtol=0.02, atol=0.02 * one.abs().max().item())
        fits = tuple(weight.shape) == (64, 128) and has_avx512bf16()
        assert packed == [False, fits, fits]  # a picture is read before the weights are repacked


def test_the_demo_takes_the_number_format_that_fits(stock, monkeypatch):
    """float32 on the processor up to half of the memory, then bfloat16; what does not fit at all is a sentence at once."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for share, given, kept in ((0.1, None, torch.float32), (0.3, None, torch.bfloat16), (0.1, torch.bfloat16, torch.bfloat16)):
        monkeypatch.setattr(demo_models, "count_parameters", lambda folder, share=share: share * memory / 2)
        assert load_chat(stock["llava"], "cpu", None, given).model.model.dtype == kept
    monkeypatch.setattr(demo_models, "count_parameters", lambda folder: memory)
    with pytest.raises(DataError, match="its weights take .* GiB and this machine has .*; take 4 or 8 bits"):
        load_chat(stock["llava"], "cpu", None)
    assert load_chat(stock["llava"], "cpu", 8).model.model.dtype == torch.bfloat16


def test_the_demo_asks_a_stock_llava_about_a_mark(stock, images, tiny_folder):
    models = Models([stock["llava"], stock["llava_next"]], tiny_folder)
    assert not models.errors
    session = Session()
    session.start(images[0])
    session.draw("", "box", [BOX[:2], BOX[2:]])
    list(ask(session, "What is [1]?", models, Settings(max_new_tokens=8)))
    for reply, kind in zip(session.turns[0].replies, KINDS, strict=True):
        question = f"What is {padded_box(*images[0].size)}?"
        assert not reply.error and reply.answer.text == StockReference(stock[kind]).answer(images[0], question, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_ask_a_stock_llava(stock, images, kind):
    """Its words come as those of any MLLM; a box in them would be of the padded square."""
    answerer = load_answerer(stock[kind], "cpu", "float32")
    targets = [Target(str(n), f"{n}.png", *image.size, "red square", BOX, "") for n, image in enumerate(images[:2])]
    predictions = answerer.ground(targets, images[:2], 2)
    question = GROUNDING_QUESTION.format("red square")
    assert [p.raw for p in predictions] == [StockReference(stock[kind]).answer(i, question, 32) for i in images[:2]]
    assert answerer.protocol["codec"] == "float2" and answerer.protocol["geometry"] == read_mllm(stock[kind])[1].image.mode


def test_the_words_behind_a_turn_are_the_tokens_that_llava_learned(stock):
    """By sentencepiece itself, piece by piece between the special tokens: each begins with a space, but behind the picture."""
    tokenizer, _ = read_mllm(stock["llava"])
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(stock["llava"] / "tokenizer.model"))
    first, second = "where is the red square?", "what is left of it?"
    turns = [("user", f"<image>\n{first}"), ("assistant", "a blue one"), ("user", second)]
    messages = [{"role": role, "content": content} for role, content in turns]
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    behind_picture = pieces.encode(f"\n{first} ASSISTANT: a blue one")
    assert pieces.id_to_piece(behind_picture[0]) == "\u2581"
    expected = [tokenizer.bos_token_id, *pieces.encode(f"{SYSTEM}USER: "), tokenizer.convert_tokens_to_ids("<image>")]
    expected += [*behind_picture[1:], tokenizer.eos_token_id, *pieces.encode(f"USER: {second} ASSISTANT:")]
    assert given == expected
