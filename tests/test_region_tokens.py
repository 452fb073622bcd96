"""Region tokens against a reference by hand: a region's feature from RegionPredictor's own parts, put into the embeddings."""

import json
import shutil

import numpy as np
import pytest
import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from encoder import RegionPredictor
from encoder.config import tiny
from encoder.errors import DataError
from encoder.masks import decode_mask
from encoder.model import ClocModel
from encoder.pretrained import load_encoder, load_processor
from encoder.processor import ClocImageProcessor, ClocProcessor
from mllm import training
from mllm.checkpoint import load_mllm, save_mllm
from mllm.config import MllmConfig
from mllm.data import pixel_collator
from mllm.dry_run import outline
from mllm.features import CachedTower, cache_features, feature_collator
from mllm.generation import GroundingModel
from mllm.likelihood import answer_likelihoods
from mllm.model import build_mllm, part_of
from mllm.region_features import cache_region_features, measure_region_features
from mllm.region_tokens import RegionLlavaForConditionalGeneration
from mllm.training import train

MASK = [[5, 5, 30, 8, 12, 30]]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_processor):
    """Pictures and questions about boxes, points and masks, a CLOC and a plain CLIP."""
    folder = tmp_path_factory.mktemp("world")
    path = write_conversations(folder, 6, text_only=2)
    records = json.loads(path.read_text())
    for record in records[:2]:  # a question about a point, and one about two regions
        turns = record["conversations"]
        question = next(t for t in turns if "<region:" in t["value"])
        question["value"] = question["value"].replace("?", " or <region:2> or <region:3>?")
        record["regions"] += [{"point": [20, 20]}, {"mask": MASK}]
    path.write_text(json.dumps(records))
    write_clip(folder / "clip", image_size=32)
    torch.manual_seed(0)
    cloc = ClocModel(tiny(vocab_size=len(tiny_processor.tokenizer)))
    cloc.vision_model.embeddings.position_embedding.weight.data.normal_()
    cloc.save_pretrained(folder / "cloc")
    ClocProcessor(ClocImageProcessor(size=32), tiny_processor.tokenizer).save_pretrained(folder / "cloc")
    return folder


def fields(world, **more) -> dict:
    more = {"tower": str(world / "cloc"), "region_tokens": "prompter", **more}
    return recipe(world, **more)


def built(world, **more):
    config = MllmConfig(**fields(world, **more))
    mllm = build_mllm(config)
    return mllm, training.read_dataset(config, mllm, config.data)


def batch_of(mllm, dataset, rows):
    collate = pixel_collator(dataset, mllm.model.config.image_token_id, mllm.tokenizer.pad_token_id)
    return collate([dataset[index] for index in rows])


def reference_feature(world, mllm, image, region, by: str) -> torch.Tensor:
    """(F,) float64, from the encoder's own classes and a sum over pixels."""
    box = region.get("box")
    if "point" in region:
        (x, y), reach = region["point"], 0.05 * max(image.size)
        box = [x - reach, y - reach, x + reach, y + reach]
    if by == "prompter":
        predictor = RegionPredictor.from_pretrained(world / "cloc")
        predictor.set_image(image)
        if "mask" in region:
            ys, xs = np.nonzero(decode_mask(mask_rle(region["mask"], image)))
            box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        return predictor.embed_boxes([box])[0].double() * 16**0.5
    encoder, geometry = load_encoder(world / "cloc"), mllm.settings.image.geometry(*image.size)
    with torch.no_grad():
        tokens = encoder.vision_model(pixel_values=mllm.settings.image.pixels([image])).last_hidden_state
        patches = encoder.vision_model.post_layernorm(tokens)[0, 1:].double()
    # Every hundredth of a patch in each direction: does its centre lie in the region?
    steps = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    points = geometry.points_to_image(torch.stack([x, y], -1))
    if "mask" in region:
        mask = torch.from_numpy(decode_mask(mask_rle(region["mask"], image)))
        column, row = points[..., 0].floor().long(), points[..., 1].floor().long()
        inside = (column >= 0) & (row >= 0) & (column < image.width) & (row < image.height)
        covered = inside & mask[row.clamp(0, image.height - 1), column.clamp(0, image.width - 1)]
    else:
        x1, y1, x2, y2 = box
        covered = (points[..., 0] > x1) & (points[..., 0] < x2) & (points[..., 1] > y1) & (points[..., 1] < y2)
    weights = covered.double().reshape(4, 100, 4, 100).sum((1, 3)).flatten()
    pooled = (weights[:, None] * patches).sum(0) / weights.sum()
    return pooled / pooled.norm() * len(pooled) ** 0.5


def mask_rle(polygons, image):
    from pycocotools import mask as rle_tools

    return rle_tools.merge(rle_tools.frPyObjects(polygons, image.height, image.width))


@pytest.mark.parametrize("by", ["prompter", "pooling"])
def test_loss_and_gradients_are_those_of_features_put_in_by_hand(world, by):
    """Rows with several regions, with one and without; the feature by the encoder's own code; in value and gradient."""
    mllm, dataset = built(world, region_tokens=by)
    model = mllm.model
    records = json.loads((world / "conversations_0.json").read_text())
    rows = [0, 6, 1, 3]
    batch = batch_of(mllm, dataset, rows)
    loss = model(**batch).loss
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    features = []
    for row in rows:
        record = records[row]
        for turn in record["conversations"]:
            names = [int(part.split(">")[0]) for part in turn["value"].split("<region:")[1:] if turn["from"] == "human"]
            image = Image.open(world / "images" / record["image"]).convert("RGB") if names else None
            features += [reference_feature(world, mllm, image, record["regions"][name], by) for name in names]
    ids = batch["input_ids"]
    assert (ids == model.config.region_token_id).sum() == len(features) == 3 * 2 + 2 + 2  # 4 with two more, 2, no text-only
    projector, tower = model.model.region_tokens.projector, model.model.vision_tower
    embeds = model.get_input_embeddings()(ids)
    patches = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    embeds = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], model.model.multi_modal_projector(patches))
    hidden = torch.stack(features).float() @ projector.linear_1.weight.T + projector.linear_1.bias
    tokens = torch.nn.functional.gelu(hidden) @ projector.linear_2.weight.T + projector.linear_2.bias
    for number, (row, place) in enumerate((ids == model.config.region_token_id).nonzero().tolist()):
        embeds = torch.cat([embeds.flatten(0, 1)[: row * ids.shape[1] + place], tokens[number][None],
                            embeds.flatten(0, 1)[row * ids.shape[1] + place + 1 :]]).view_as(embeds)  # fmt: skip
    logits = model.lm_head(
        model.model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).last_hidden_state
    )
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected.backward()
    tolerance = 1e-5 if by == "prompter" else 1e-3  # the reference counts points
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    for name, parameter in model.named_parameters():
        if part_of(name) != "tower":
            bound = 10 * tolerance * float(parameter.grad.abs().max())
            torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=bound + 1e-7, msg=name)
    assert got["model.region_tokens.projector.linear_1.weight"].abs().max() > 0


def test_the_last_layer_is_read_whatever_layer_the_picture_is(world):
    features = {}
    for layer in (-1, -2):
        mllm, dataset = built(world, feature_layer=layer)
        features[layer] = measure_region_features(mllm.model, dataset)
    assert torch.equal(features[-1], features[-2]) and features[-1].square().mean().sqrt() == pytest.approx(1, abs=1e-4)


def test_a_batch_without_regions_reaches_prompter_and_projector(world):
    """Zero gradients, not missing ones: a rank without regions takes part in every collective, and adds nothing."""
    mllm, dataset = built(world)
    batch = batch_of(mllm, dataset, [6, 7])
    assert batch["region_boxes"].shape == (0, 4)
    loss = mllm.model(**batch).loss
    loss.backward()
    for name, parameter in mllm.model.model.region_tokens.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_shared_rows_and_cached_features_change_nothing(world, tmp_path):
    mllm, apart = built(world)
    _, shared = built(world, share_pictures=True)
    ids = mllm.model.config.image_token_id, mllm.tokenizer.pad_token_id
    parts = mllm.model.model.region_tokens.projector.parameters
    losses, gradients = [], []
    for dataset in (apart, shared):
        loss = mllm.model(**batch_of(mllm, dataset, range(len(dataset)))).loss
        mllm.model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in parts()])
    features = cache_features(mllm.model, apart, tmp_path, progress=False)
    regions = cache_region_features(mllm.model, apart, tmp_path, batch_size=2, progress=False)
    assert torch.equal(regions, cache_region_features(mllm.model, apart, tmp_path, progress=False))  # the second time from disk
    tower, mllm.model.model.vision_tower = mllm.model.model.vision_tower, CachedTower(mllm.model.config.vision_feature_layer)
    batch = feature_collator(apart, features, *ids, regions)([apart[i] for i in range(len(apart))])
    mllm.model.zero_grad()
    loss = mllm.model(**batch).loss
    loss.backward()
    losses.append(loss.item())
    gradients.append([p.grad.clone() for p in parts()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-4)
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3 * float(a.abs().max()))
    with torch.no_grad():  # another region, another cache
        apart.regions._boxes[0] += 0.1
    mllm.model.model.vision_tower = tower
    assert not torch.equal(cache_region_features(mllm.model, apart, tmp_path, progress=False), regions)


def test_questions_with_several_rows_a_picture_join_with_their_regions(world, tmp_path):
    path = world / "conversations_0.json"
    records = []
    for record in json.loads(path.read_text()):
        turns = record["conversations"]
        for number in range(0, len(turns), 2):
            question, answer = turns[number : number + 2]
            text = question["value"].removeprefix("<image>\n")
            mark = "<image>\n" if "image" in record else ""
            pair = [{"from": "human", "value": mark + text}, answer]
            records.append({**record, "id": f"{record['id']}/{number}", "conversations": pair})
    (tmp_path / "single.json").write_text(json.dumps(records))
    losses, rows = [], []
    for joined in ({}, {"share_pictures": True}, {"share_pictures": True, "pack": True}):
        mllm, dataset = built(world, data=[str(tmp_path / "single.json")], **joined)
        batch = batch_of(mllm, dataset, range(len(dataset)))
        assert len(batch["region_boxes"]) == 16 and (batch["attention_mask"].ndim == 4) == bool(joined)
        losses.append(mllm.model(**batch).loss.item())
        rows.append(len(dataset))
    assert rows[0] == 26 and rows[1] == 8 and rows[2] < 8
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_region_of_the_second_picture_is_read_there(world, tmp_path):
    names = sorted(path.name for path in (world / "images").glob("*.png"))[:2]
    turns = [{"from": "human", "value": "<image>\n<image>\nWhat is <region:0>?"}, {"from": "gpt", "value": "a square"}]
    region = {"box": [4, 6, 30, 33], "image_index": 1}
    (tmp_path / "two.json").write_text(json.dumps([{"id": "a", "images": names, "conversations": turns, "regions": [region]}]))
    mllm, dataset = built(world, data=[str(tmp_path / "two.json")])
    assert batch_of(mllm, dataset, [0])["region_image_index"].tolist() == [1]
    image = Image.open(world / "images" / names[1]).convert("RGB")
    expected = reference_feature(world, mllm, image, region, "prompter").float()
    torch.testing.assert_close(measure_region_features(mllm.model, dataset)[0], expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def trained(world):
    return train(MllmConfig(**fields(world, output=str(world / "trained"), cache_features=True)))


def test_a_trained_folder_loads_as_our_class_and_answers_by_its_regions(world, trained):
    model, tokenizer, settings = load_mllm(trained)
    assert type(model) is RegionLlavaForConditionalGeneration and settings.regions == "prompter"
    again = AutoModelForImageTextToText.from_pretrained(trained, dtype=torch.float32)
    assert type(again) is type(model)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    cloc = load_encoder(world / "cloc").prompter.state_dict()
    for name, value in model.model.region_tokens.prompter.state_dict().items():
        assert torch.equal(value, cloc[name].bfloat16().float()), name
    moved = build_mllm(MllmConfig(**fields(world))).model.model.region_tokens.projector.linear_1.weight
    assert not torch.equal(moved, model.model.region_tokens.projector.linear_1.weight)


def test_answers_are_those_of_the_plain_forward_and_do_not_depend_on_the_batch(world, trained):
    grounding = GroundingModel.from_pretrained(trained)
    for name, parameter in grounding.model.named_parameters():
        if "language_model.layers" in name and parameter.ndim > 1:
            parameter.data *= 8  # answers then depend on question and picture
    marks = [grounding.image_token_id, grounding.model.config.region_token_id]
    grounding.model.lm_head.weight.data[marks] = 0  # a mark in an answer would count as one of the prompt below
    pictures = [Image.open(path).convert("RGB") for path in sorted((world / "images").glob("*.png"))[:2]]
    images = [pictures[i] for i in (0, 1, 0, 1, 0)]
    questions = [
        "What is <region>?",
        "What is <region:1> in <region:0>?",
        "Where is the red square?",
        "Is <region>?",
        "<region>?",
    ]
    regions = [[(1, 2, 20, 30)], [{"point": [20, 20]}, (5, 5, 30, 30)], [], [{"mask": MASK}], [{"point": [3, 3]}]]
    got = grounding.generate(images, questions, regions, batch_size=64, max_new_tokens=8, progress=False)
    alone = grounding.generate(images, questions, regions, batch_size=1, max_new_tokens=8, progress=False)
    assert got == alone
    other = grounding.generate(images[:1], questions[:1], [[(20, 2, 39, 39)]], max_new_tokens=8, progress=False)
    model = grounding.model
    seen = []
    for image, question, given in zip(images, questions, regions, strict=True):
        prefix, end = grounding._prompt_ids(image, question, given)
        ids = [i for token in [*prefix, *end] for i in ([token] * 16 if token == grounding.image_token_id else [token])]
        more = grounding.region_features([question], [image], [given])
        pixels, new = grounding.settings.image.pixels([image]), []
        with torch.no_grad():
            while len(new) < 8 and (not new or new[-1] not in grounding.end_ids):
                logits = model(input_ids=torch.tensor([ids + new]), pixel_values=pixels, **more).logits
                new.append(int(logits[0, -1].argmax()))
        seen.append(grounding.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert got == seen and len({*got, *other}) > 2
    # How likely an answer is depends on the region, and not on the batch.
    rows = [(images[i], questions[i], regions[i], "red square") for i in (0, 1, 3)]
    together = answer_likelihoods(grounding, rows)
    assert together == pytest.approx([answer_likelihoods(grounding, [row])[0] for row in rows], rel=1e-4)
    other = answer_likelihoods(grounding, [(*rows[0][:2], [(20, 2, 39, 39)], "red square")])
    assert other[0] != pytest.approx(together[0], rel=1e-3)
    with pytest.raises(DataError, match="holds the mark <region_feature>"):
        grounding.generate(images[:1], ["What is <region_feature>?"], progress=False)


def test_region_tokens_are_turned_on_in_a_folder_without(world, tmp_path):
    plain = train(MllmConfig(**fields(world, output=str(tmp_path / "plain"), region_tokens="coords")))
    assert type(load_mllm(plain)[0]) is LlavaForConditionalGeneration
    assert "region_feature" not in (plain / "tokenizer.json").read_text()
    stock = json.loads((plain / "config.json").read_text())
    assert stock["model_type"] == "llava" and "region_tokens" not in stock
    more = train(MllmConfig(**fields(world, tower=None, model=str(plain), output=str(tmp_path / "more"))))
    model, tokenizer, settings = load_mllm(more)
    assert settings.regions == "prompter" and tokenizer.convert_tokens_to_ids("<region_feature>") < len(tokenizer)
    before = load_mllm(plain)[0]
    ids = torch.tensor([tokenizer("Where is the red square?")["input_ids"]])
    start = build_mllm(MllmConfig(**fields(world, tower=None, model=str(plain)))).model
    torch.testing.assert_close(start(input_ids=ids).logits[..., : before.lm_head.out_features], before(input_ids=ids).logits)
    # And on from there it needs no flag.
    assert build_mllm(MllmConfig(**fields(world, tower=None, model=str(more), region_tokens=None))).settings.regions == "prompter"
    with pytest.raises(DataError, match="region_tokens is pooling, but the MLLM .* was trained with prompter"):
        build_mllm(MllmConfig(**fields(world, tower=None, model=str(more), region_tokens="pooling")))
    other = shutil.copytree(world / "cloc", tmp_path / "other")
    changed = ClocModel.from_pretrained(other)
    changed.vision_model.post_layernorm.bias.data += 1
    changed.save_pretrained(other)
    away = shutil.copytree(plain, tmp_path / "away")
    settings = json.loads((away / "grounding.json").read_text())
    (away / "grounding.json").write_text(json.dumps({**settings, "tower_path": "gone/cloc"}))
    for act in (build_mllm, outline):
        with pytest.raises(DataError, match="needs a CLOC, but its folder gone/cloc is not there; name it with prompter"):
            act(MllmConfig(**fields(world, tower=None, model=str(away))))
    with pytest.raises(DataError, match="was trained on another tower than that of"):
        build_mllm(MllmConfig(**fields(world, tower=None, model=str(plain), prompter=str(other))))


def test_a_projector_of_a_folder_with_region_tokens_brings_both(world, trained):
    built_again = build_mllm(MllmConfig(**fields(world, projector=str(trained))))
    assert not built_again.new_regions
    weights = load_file(trained / "model.safetensors")
    saved = weights["model.region_tokens.projector.linear_1.weight"].float()
    assert torch.equal(built_again.model.model.region_tokens.projector.linear_1.weight, saved)


def test_a_folder_is_saved_and_read_back_bit_by_bit(world, tmp_path):
    mllm, _ = built(world, region_tokens="pooling")
    save_mllm(tmp_path, mllm.model, mllm.tokenizer, mllm.settings, torch.float32, None, mllm.sentencepiece_model)
    model, _, settings = load_mllm(tmp_path)
    assert settings.regions == "pooling" and model.config.prompter is None
    for (name, a), b in zip(mllm.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"region_tokens": "boxes"}, "region_tokens is 'boxes'; choose one of coords, prompter, pooling"),
        ({"region_tokens": "coords", "prompter": "x"}, "prompter is given, but region_tokens is not prompter"),
        ({"llm": "x", "llm_preset": None, "train": ["llm"]}, "has a projector that must be learned; add projector to train"),
    ],
)
def test_contradictions_are_refused(world, more, message):
    with pytest.raises(DataError, match=message):
        MllmConfig(**fields(world, **more))


def test_a_plain_clip_has_no_prompter_but_can_be_pooled(world):
    with pytest.raises(DataError, match="holds a clip, which has no Prompter; name a CLOC with prompter, or take region_tokens"):
        built(world, tower=str(world / "clip"))
    mllm, dataset = built(world, tower=str(world / "clip"), region_tokens="pooling")
    assert mllm.model(**batch_of(mllm, dataset, [0, 3])).loss.isfinite()
    write_clip(world / "wide", width=48, image_size=32)
    with pytest.raises(DataError, match="reads a tower of hidden_size 32, the MLLM's tower has 48"):
        built(world, tower=str(world / "wide"), prompter=str(world / "cloc"))
    assert load_processor(world / "cloc").image_processor.size == 32
