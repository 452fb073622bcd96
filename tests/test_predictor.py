"""`RegionPredictor` equals the model's own methods called by hand, in the original image's pixels; bad input is a sentence."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from encoder import RegionPredictor
from encoder.errors import DataError

BOXES = [[2.0, 3.0, 20.0, 30.5], [10.0, 1.0, 39.0, 35.0], [0.0, 0.0, 12.5, 8.25]]


@pytest.fixture()
def predictor(tiny_model, tiny_processor):
    return RegionPredictor(tiny_model, tiny_processor)


@pytest.fixture()
def picture(painted):
    return painted(3)[0]


def test_embed_boxes_equals_the_model_by_hand(predictor, tiny_model, tiny_processor, picture):
    predictor.set_image(picture)
    inputs, (geometry,) = tiny_processor.images([picture])
    with torch.no_grad():
        image = tiny_model.encode_image(inputs["pixel_values"])
        boxes = geometry.boxes_to_model(torch.tensor(BOXES))
        expected = normalize(tiny_model.embed_boxes(image.tokens, boxes, torch.zeros(3, dtype=torch.long)), dim=-1)
    for given in (BOXES, np.array(BOXES), np.array(BOXES, dtype=np.float64), torch.tensor(BOXES)):
        torch.testing.assert_close(predictor.embed_boxes(given), expected)
    torch.testing.assert_close(predictor.embed_boxes(BOXES).norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(predictor.image_embedding, normalize(image.feat[0], dim=-1))
    for empty in ([], np.zeros((0, 4)), torch.zeros(0, 4)):
        assert predictor.embed_boxes(empty).shape == (0, tiny_model.config.projection_dim)


def test_a_second_image_replaces_the_first(predictor, painted):
    predictor.set_image(painted(3)[0])
    first = predictor.embed_boxes(BOXES)
    predictor.set_image(painted(7)[0])
    assert not torch.allclose(first, predictor.embed_boxes(BOXES))
    predictor.set_image(painted(3)[0])
    assert torch.equal(first, predictor.embed_boxes(BOXES))


def test_classify_boxes_gives_the_highest_cosine(predictor, picture):
    predictor.set_image(picture)
    names = ["red square", "Blue Bar", "an empty grey wall"]
    index, cosines = predictor.classify_boxes(BOXES, names)
    expected = predictor.embed_boxes(BOXES) @ predictor.embed_texts(names).T
    torch.testing.assert_close(cosines, expected)
    assert index.tolist() == [int(row.argmax()) for row in expected]
    torch.testing.assert_close(predictor.embed_texts(["BLUE bar"]), predictor.embed_texts(["blue bar"]))  # lower-cased


def test_texts_are_encoded_once(predictor):
    names, rows = ["red square", "red square", "blue dot"], []
    predictor.model.text_model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first, again = predictor.embed_texts(names), predictor.embed_texts(["blue dot", "red square"])
    assert rows == [2]
    assert torch.equal(first[0], first[1]) and torch.equal(again[0], first[2]) and torch.equal(again[1], first[0])


def test_ground_equals_the_model_by_hand_and_stays_in_the_image(predictor, tiny_model, tiny_processor, picture):
    predictor.set_image(picture)
    phrases = ["small red square", "blue bar", "small red square"]
    boxes, scores = predictor.ground(phrases)
    inputs, (geometry,) = tiny_processor.images([picture])
    with torch.no_grad():
        image, zeros = tiny_model.encode_image(inputs["pixel_values"]), torch.zeros(3, dtype=torch.long)
        text_feat = tiny_model.encode_text(**tiny_processor.texts(phrases))
        raw = tiny_model.predict_boxes(tiny_model.embed_texts(image.tokens, text_feat, zeros))
        x, y = raw[:, 0::2].sort(dim=1).values, raw[:, 1::2].sort(dim=1).values
        expected = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1).clamp(0, 1)
        region = normalize(tiny_model.embed_boxes(image.tokens, expected, zeros), dim=-1)
    torch.testing.assert_close(boxes, geometry.boxes_to_image(expected), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores, (region * normalize(text_feat, dim=-1)).sum(-1), rtol=1e-4, atol=1e-5)
    assert (boxes[:, :2] <= boxes[:, 2:]).all() and (boxes >= 0).all()
    assert (boxes[:, 0::2] <= picture.width).all() and (boxes[:, 1::2] <= picture.height).all()
    none = predictor.ground([])
    assert none[0].shape == (0, 4) and none[1].shape == (0,)


def test_bfloat16_gives_float32_embeddings(tiny_model, tiny_processor, picture):
    exact = RegionPredictor(tiny_model, tiny_processor)
    exact.set_image(picture)
    expected = exact.embed_boxes(BOXES)
    rough = RegionPredictor(tiny_model.to(torch.bfloat16), tiny_processor)
    rough.set_image(picture)
    got = rough.embed_boxes(BOXES)
    assert got.dtype == torch.float32
    assert (got * expected).sum(-1).min() > 0.99
    assert rough.ground(["red square"])[0].dtype == torch.float32


def test_from_pretrained(tiny_folder, picture):
    predictor = RegionPredictor.from_pretrained(tiny_folder)
    predictor.set_image(picture)
    assert predictor.embed_boxes(BOXES).shape == (3, 16)


def test_bad_input_is_one_sentence(predictor, picture, tmp_path):
    uses = (lambda: predictor.embed_boxes(BOXES), lambda: predictor.ground(["red"]), lambda: predictor.image_embedding)
    for use in uses:
        with pytest.raises(DataError, match=r"no image is set; call set_image\(image\) first"):
            use()
    with pytest.raises(DataError, match="set_image was given a str"):
        predictor.set_image("street.jpg")
    predictor.set_image(picture)
    width, height = picture.size
    for bad in ([5, 5, 5, 9], [9, 5, 4, 9], [0, 0, width + 5, 4], [-4, 0, 3, 3], [0, 0, float("nan"), 3]):
        with pytest.raises(DataError, match=rf"box 1 is .*inside the {width}x{height} px image"):
            predictor.embed_boxes([BOXES[0], bad])
    with pytest.raises(DataError, match=r"boxes have the shape \(4,\)"):
        predictor.embed_boxes(BOXES[0])
    for ragged in ([[1, 2, 3, 4], [1, 2]], [["a", 1, 2, 3]], None):
        with pytest.raises(DataError, match="boxes are no table of numbers|boxes have the shape"):
            predictor.embed_boxes(ragged)
    with pytest.raises(DataError, match="names is empty"):
        predictor.classify_boxes(BOXES, [])
    with pytest.raises(DataError, match="give a list of texts"):
        predictor.classify_boxes(BOXES, "red square")
    with pytest.raises(DataError, match="config.json does not exist"):
        RegionPredictor.from_pretrained(tmp_path / "nowhere")


def test_a_clip_model_is_refused(tiny_model, tiny_processor):
    config = tiny_model.config
    clip = CLIPModel(CLIPConfig(text_config=config.text_config.to_dict(), vision_config=config.vision_config.to_dict()))
    with pytest.raises(DataError, match="was given a CLIPModel, which has no Prompter"):
        RegionPredictor(clip, tiny_processor)
