"""MLLMs on pictures in tiles: a stock LlavaNext in training, on disk and in answers, against transformers' own."""

import json
import re

import pytest
import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from encoder.config import tiny
from encoder.errors import DataError
from encoder.model import ClocModel
from encoder.pretrained import load_encoder
from encoder.processor import ClocImageProcessor, ClocProcessor
from eval.answering import MllmAnswerer
from eval.predictions import Target
from mllm import training
from mllm.chat import GroundingChat
from mllm.checkpoint import load_mllm
from mllm.config import MllmConfig
from mllm.conversation import IGNORE
from mllm.data import pixel_collator
from mllm.dry_run import dry_run
from mllm.generation import GroundingModel
from mllm.image_input import read_picture
from mllm.likelihood import answer_likelihoods
from mllm.model import build_mllm
from mllm.region_tokens import RegionLlavaNextForConditionalGeneration
from mllm.trainer import parameter_groups

QUESTION = "Where is the red square?"


def fields(world, **more) -> dict:
    return recipe(world, **{"geometry": "anyres", "max_length": 384, **more})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 6, text_only=2)
    write_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def mllm(world):
    return build_mllm(MllmConfig(**fields(world)))


@pytest.fixture(scope="module")
def trained(world):
    """Everything learns, until the few conversations are known by heart."""
    parts = {"train": ["projector", "llm", "tower"], "tower_learning_rate": 1e-4, "learning_rate": 3e-3}
    return training.train(
        MllmConfig(**fields(world, **parts, max_steps=150, batch_size=8, save_every=0, log_every=150, save_dtype="float32"))
    )


@pytest.fixture(scope="module")
def pictures(world):
    paths = sorted((world / "images").glob("*.png"))
    by_size = {picture.size: picture for picture in map(read_picture, paths)}
    assert len(by_size) == 3
    return list(by_size.values())


def dataset_of(world, mllm, **more):
    config = MllmConfig(**fields(world, **more))
    return training.read_dataset(config, mllm, config.data)


def loss_and_gradients(mllm, dataset, rows):
    collate = pixel_collator(dataset, mllm.model.config.image_token_id, mllm.tokenizer.pad_token_id)
    mllm.model.zero_grad()
    loss = mllm.model(**collate([dataset[index] for index in rows])).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in mllm.model.named_parameters() if p.grad is not None}


def test_it_is_a_stock_llava_next(mllm):
    assert type(mllm.model) is LlavaNextForConditionalGeneration
    assert not any(p.is_meta for p in mllm.model.parameters()) and not any(b.is_meta for b in mllm.model.buffers())
    assert mllm.model.config.image_grid_pinpoints == [[40, 80], [80, 40], [80, 80], [120, 40], [40, 120]]
    assert mllm.model.model.image_newline.std().item() == pytest.approx(32**-0.5, rel=0.4)


def test_a_batch_has_every_picture_with_its_own_number_of_tokens(world, mllm):
    dataset = dataset_of(world, mllm)
    collate = pixel_collator(dataset, mllm.model.config.image_token_id, mllm.tokenizer.pad_token_id)
    batch = collate([dataset[index] for index in range(len(dataset))])
    sizes = [read_picture(dataset.image_path(index)).size for index in range(6)]
    assert batch["image_sizes"].tolist() == [[height, width] for width, height in sizes]
    counts = [mllm.settings.image.num_tokens(*size, 25) for size in sizes]
    assert (batch["input_ids"] == mllm.model.config.image_token_id).sum(1).tolist() == [*counts, 0, 0] and len(set(counts)) > 1
    assert batch["attention_mask"].sum(1).tolist() == dataset.lengths.tolist()
    assert torch.isfinite(mllm.model(**batch).loss)


def test_a_batch_of_text_alone_runs_every_part_and_adds_nothing(world, mllm):
    dataset = dataset_of(world, mllm)
    assert not dataset[6].images and not dataset[7].images
    _, gradients = loss_and_gradients(mllm, dataset, [6, 7])
    for name in ("model.image_newline", "model.multi_modal_projector.linear_1.weight", "model.vision_tower.pre_layrnorm.weight"):
        assert not gradients[name].any()


def test_packed_rows_give_the_loss_and_the_gradients_of_their_records(world, mllm):
    apart, packed = dataset_of(world, mllm), dataset_of(world, mllm, pack=True)
    assert len(packed) < len(apart) and packed.lengths.max() <= 384
    loss, gradients = loss_and_gradients(mllm, apart, range(len(apart)))
    joint_loss, joint = loss_and_gradients(mllm, packed, range(len(packed)))
    assert joint_loss == pytest.approx(loss, rel=1e-6) and gradients.keys() == joint.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(joint[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_each_part_learns_at_its_rate(world, mllm):
    config = MllmConfig(
        **fields(
            world, train=["projector", "llm", "tower"], learning_rate=2e-5, tower_learning_rate=2e-6, projector_learning_rate=1e-4
        )
    )
    rates = {id(p): group["lr"] for group in parameter_groups(mllm.model, config) for p in group["params"]}
    names = dict(mllm.model.named_parameters())
    assert rates[id(names["model.vision_tower.pre_layrnorm.weight"])] == 2e-6
    assert rates[id(names["model.image_newline"])] == 1e-4 and rates[id(names["lm_head.weight"])] == 2e-5


def test_training_learns_the_samples_and_moves_every_part(world, trained, pictures):
    start, (model, _, _) = build_mllm(MllmConfig(**fields(world))).model.state_dict(), load_mllm(trained)
    for name in ("model.image_newline", "model.vision_tower.pre_layrnorm.weight", "model.multi_modal_projector.linear_1.weight"):
        assert not torch.equal(model.state_dict()[name], start[name]), name
    records = [r for r in json.loads((world / "conversations_0.json").read_text()) if "image" in r]
    asked = [
        (r, turn, r["conversations"][number + 1]["value"]) for r in records for number, turn in enumerate(r["conversations"][:1])
    ]
    grounding = GroundingModel.from_pretrained(trained)
    images = [read_picture(world / "images" / record["image"]) for record, _, _ in asked]
    named = re.compile(r"<region:(\d)>")
    questions = [named.sub("<region>", turn["value"].removeprefix("<image>\n")) for _, turn, _ in asked]
    boxes = [[record["regions"][int(n)]["box"] for n in named.findall(turn["value"])] for record, turn, _ in asked]
    answers = grounding.generate(images, questions, boxes, progress=False)
    for (record, _, expected), answer, image in zip(asked, answers, images, strict=True):
        if expected.startswith("<box"):
            box, _ = grounding.decode_box(answer, image.size)
            truth = record["regions"][int(expected[5])]["box"]
            assert box is not None and max(abs(a - b) for a, b in zip(box, truth, strict=True)) < 0.2
        else:
            assert answer == expected


def test_stock_transformers_reads_the_folder_and_gives_the_same_logits(trained, pictures):
    stock, info = LlavaNextForConditionalGeneration.from_pretrained(trained, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor, ours = AutoProcessor.from_pretrained(trained), GroundingModel.from_pretrained(trained)
    assert type(processor).__name__ == "LlavaNextProcessor"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    for picture in pictures:
        inputs = processor(images=picture, text=prompt, return_tensors="pt", add_special_tokens=False)
        prefix, question = ours._prompt_ids(picture, QUESTION, [])
        ids = torch.tensor([[*prefix[:-1], *[ours.image_token_id] * ours.num_image_tokens(picture), *question]])
        assert torch.equal(ids, inputs["input_ids"])
        with torch.no_grad():
            expected = stock.eval()(**inputs).logits
            torch.testing.assert_close(ours.model(input_ids=ids, **ours.picture_inputs([picture])).logits, expected)
        new = stock.generate(**inputs, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        answer = processor.decode(new, skip_special_tokens=True).strip()
        assert ours.generate([picture], [QUESTION], max_new_tokens=24, progress=False) == [answer]


def test_answers_do_not_depend_on_the_batch_and_chat_streams_them(trained, pictures):
    model, chat = GroundingModel.from_pretrained(trained), GroundingChat.from_pretrained(trained)
    questions = ["Where is the red square?", "Where is the blue square?", "What is <region>?"]
    images = [picture for picture in pictures for _ in questions]
    boxes = [[(2, 2, 30, 20)] if "<region>" in question else [] for _ in pictures for question in questions]
    together = model.generate(images, questions * 3, boxes, progress=False)
    alone = [model.generate([i], [q], [b], progress=False)[0] for i, q, b in zip(images, questions * 3, boxes, strict=True)]
    assert together == alone and len(set(together)) > 2
    *pieces, answer = chat.stream(pictures[0], questions[0], max_new_tokens=32)
    assert "".join(pieces) == answer.text == together[0] and len(answer.boxes) == 1
    talk = chat.talk(pictures[1])
    assert talk.ask(questions[0], max_new_tokens=32).text == together[3]
    assert talk.ask(questions[1], max_new_tokens=32).text


def test_likelihoods_of_a_batch_are_those_alone(trained, pictures):
    model = GroundingModel.from_pretrained(trained)
    rows = [
        (picture, "What is <region>?", [(2, 2, 30, 20)], name) for picture in pictures for name in ("red square", "blue square")
    ]
    alone = [answer_likelihoods(model, [row])[0] for row in rows]
    assert answer_likelihoods(model, rows) == pytest.approx(alone, rel=1e-4)


def test_a_run_goes_on_from_the_folder_and_from_its_projector(world, trained):
    more = MllmConfig(**recipe(world, model=str(trained)))
    on = build_mllm(more)
    assert on.settings.image.mode == "anyres"
    new = build_mllm(MllmConfig(**fields(world, projector=str(trained))))
    for name in ("image_newline", "multi_modal_projector.linear_1.weight"):
        assert torch.equal(new.model.model.state_dict()[name], on.model.model.state_dict()[name])
    for wrong, message in (({"geometry": "pad"}, "trained with anyres"), ({"tile_grids": ["2x2"]}, "tile_grids is ")):
        with pytest.raises(DataError, match=message):
            build_mllm(MllmConfig(**recipe(world, model=str(trained), **wrong)))


def test_an_evaluation_asks_such_a_folder(world, trained):
    """Boxes come back in pixels of the original picture; what is compared says that there were tiles, and which."""
    targets, images = [], []
    for record in json.loads((world / "conversations_0.json").read_text()):
        question, answer = (turn["value"] for turn in record["conversations"][:2])
        if answer.startswith("<box"):  # it was trained to answer this at once
            name = question.removeprefix("<image>\n").removeprefix("Where is ").rstrip("?")
            box, size = record["regions"][int(answer[5])]["box"], (record["width"], record["height"])
            targets.append(Target(record["id"], record["image"], *size, name, tuple(box), name))
            images.append(read_picture(world / "images" / record["image"]))
    answerer = MllmAnswerer(trained, "cpu", torch.float32)
    predictions = answerer.ground(targets, images, 4)
    assert answerer.protocol["geometry"] == "anyres" and answerer.record["tile_grids"][0] == [1, 2]
    assert len({(target.width, target.height) for target in targets}) > 1
    for target, prediction in zip(targets, predictions, strict=True):
        assert prediction.box == pytest.approx(target.box, abs=0.2)


def test_lora_on_such_a_folder_is_kept_apart_and_found_again(world, trained, tmp_path):
    parts = {"train": ["projector", "llm_lora"], "lora_rank": 4, "save_adapter": True, "max_steps": 1, "save_every": 0}
    adapter = training.train(MllmConfig(**recipe(world, model=str(trained), output=str(tmp_path), max_length=384, **parts)))
    model, _, settings = load_mllm(adapter)
    assert type(model) is LlavaNextForConditionalGeneration and settings.image.tile_grids[0] == (1, 2)
    assert "model.image_newline" in load_file(adapter / "trained.safetensors")


def test_a_dry_run_says_what_it_costs(world, capsys):
    dry_run(MllmConfig(**fields(world)))
    out = capsys.readouterr().out
    assert "8 conversations on 6 pictures" in out and "\u00abred square" in out.replace("\u00ab ", "\u00ab")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cache_features": True, "train": ["projector", "llm"]}, "cache_features keeps one square a picture"),
        ({"geometry": "pad", "tile_grids": ["1x2"]}, "tile_grids is given, but geometry is not anyres"),
        ({"tile_grids": ["1x1"]}, "tile_grids has '1x1'"),
        ({"max_length": 60}, "has no supervised token within 60 tokens"),
    ],
)
def test_what_does_not_combine_is_refused_in_one_sentence(world, wrong, message):
    with pytest.raises(DataError, match=message) as error:
        config = MllmConfig(**fields(world, **wrong))
        training.read_dataset(config, build_mllm(config), config.data)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def cloc(tmp_path_factory, tiny_processor):
    """A CLOC of 32 px, and a recipe's fields of an MLLM on it."""
    folder = tmp_path_factory.mktemp("cloc")
    torch.manual_seed(0)
    encoder = ClocModel(tiny(vocab_size=len(tiny_processor.tokenizer)))
    encoder.vision_model.embeddings.position_embedding.weight.data.normal_()
    encoder.save_pretrained(folder)
    ClocProcessor(ClocImageProcessor(size=32), tiny_processor.tokenizer).save_pretrained(folder)
    return folder


def test_regions_are_read_on_the_square_of_the_whole_picture(world, cloc, tmp_path):
    """The features behind the marks are the encoder's own of boxes in the squashed picture, whatever tiles stand between."""
    short = {"output": str(tmp_path / "run"), "max_steps": 2, "save_every": 0, "save_dtype": "float32"}
    config = MllmConfig(**fields(world, tower=str(cloc), region_tokens="prompter", **short))
    model, _, settings = load_mllm(training.train(config))
    assert type(model) is RegionLlavaNextForConditionalGeneration and model.config.model_type == "llava_next_regions"
    grounding = GroundingModel.from_pretrained(tmp_path / "run")
    mllm = build_mllm(config)
    dataset = training.read_dataset(config, mllm, config.data)
    seen = []
    model.model.region_tokens.projector.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    collate = pixel_collator(dataset, model.config.image_token_id, mllm.tokenizer.pad_token_id)
    with torch.no_grad():
        loss = model(**collate([dataset[index] for index in range(len(dataset))])).loss
    assert torch.isfinite(loss)
    expected, squash, encoder = [], ClocImageProcessor(32, "squash"), load_encoder(cloc)
    records = [r for r in json.loads((world / "conversations_0.json").read_text()) if "image" in r]
    for record in records:
        image = read_picture(world / "images" / record["image"])
        text = " ".join(turn["value"] for turn in record["conversations"] if turn["from"] == "human")
        names = [int(part[0]) for part in text.split("<region:")[1:]]
        boxes = torch.tensor([record["regions"][index]["box"] for index in names]) / torch.tensor(image.size * 2)
        with torch.no_grad():
            tokens = encoder.encode_image(squash([image])["pixel_values"]).tokens
            found = encoder.embed_boxes(tokens, boxes.float(), torch.zeros(len(boxes), dtype=torch.long))
        expected.append(torch.nn.functional.normalize(found, dim=-1) * found.shape[-1] ** 0.5)
    torch.testing.assert_close(seen[0], torch.cat(expected), rtol=1e-4, atol=1e-4)
    images = [read_picture(world / "images" / record["image"]) for record in records[:3]]
    boxes = [[record["regions"][0]["box"]] for record in records[:3]]
    together = grounding.generate(images, ["What is <region>?"] * 3, boxes, max_new_tokens=8, progress=False)
    alone = [
        grounding.generate([i], ["What is <region>?"], [b], max_new_tokens=8, progress=False)[0]
        for i, b in zip(images, boxes, strict=True)
    ]
    assert together == alone and settings.model_type == "llava_next_regions"


def test_labels_are_the_answers_alone(world, mllm):
    dataset = dataset_of(world, mllm)
    batch = pixel_collator(dataset, mllm.model.config.image_token_id, mllm.tokenizer.pad_token_id)([dataset[0]])
    said = batch["labels"][0] != IGNORE
    assert int(said.sum()) == int(dataset[0].supervised.sum()) and not (batch["labels"] == mllm.model.config.image_token_id).any()
