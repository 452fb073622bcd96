"""Rows that share a picture against the same records in rows of their own, in a stock Llava."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from safetensors.torch import load_file

from encoder.errors import DataError
from mllm.box_text import BoxCodec
from mllm.config import MllmConfig, check_identity
from mllm.data import ConversationDataset, pixel_collator
from mllm.model import build_mllm
from mllm.packing import NO_TOKEN, TokenRow, attends_to_all, attention_of, own_row, pack_rows, share_pictures
from mllm.training import train

MARK, TOKENS = 7, (4,) * 5


def test_who_sees_whom():
    segments, roots = np.array([[[0, 0, 1, 1, 2, NO_TOKEN]], [[0, 0, 0, 0, 0, NO_TOKEN]]])
    mask, positions = attention_of(segments, roots)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert mask.dtype == bool and (mask[0, 0] == np.array(expected)).all()
    assert positions[0, :5].tolist() == [0, 1, 2, 3, 2]


def test_documents_of_a_row_do_not_see_each_other():
    segments, roots = np.array([[[0, 0, 1, 2, 3, 3, 4]], [[0, 0, 0, 0, 3, 3, 3]]])
    mask, positions = attention_of(segments, roots)
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1],
    ]
    assert (mask[0, 0] == np.array(expected)).all() and positions[0].tolist() == [0, 1, 2, 2, 0, 1, 2]


def row(text: list[int], *images: int, supervised_from: int = -1) -> TokenRow:
    supervised = np.arange(len(text)) >= (supervised_from % len(text))
    return own_row(np.array(text, np.int32), supervised, images)


def test_rows_join_by_picture_and_prefix_up_to_the_limit():
    rows = [
        row([1, MARK, 2, 3], 0),
        row([1, MARK, 4, 4], 1),
        row([1, MARK, 5, 5], 0),
        row([9, MARK, 6, 6], 0),  # another prefix
        row([1, MARK, 8, 8, 8], 0),  # no room: 1 + 4 + 2 + 2 + 3 > 10
        row([1, MARK, 3, 3], 0),  # goes to the row opened last
        row([1, 2]),
        row([1, 2]),
        row([1, MARK, 2], 1, supervised_from=2),  # answers at once
    ]
    joint = share_pictures(rows, MARK, TOKENS, 10)
    assert [r.ids.tolist() for r in joint] == [
        [1, MARK, 2, 3, 5, 5], [1, MARK, 4, 4], [9, MARK, 6, 6], [1, MARK, 8, 8, 8, 3, 3], [1, 2], [1, 2], [1, MARK, 2],
    ]  # fmt: skip
    assert joint[0].segments.tolist() == [0, 0, 1, 1, 2, 2] and joint[0].supervised.tolist() == [0, 0, 0, 1, 0, 1]
    assert [r.images for r in joint] == [(0,), (1,), (0,), (0,), (), (), (1,)]
    assert sum(r.supervised.sum() for r in joint) == sum(r.supervised.sum() for r in rows)


def test_rows_with_several_pictures_join_after_the_last():
    rows = [row([1, MARK, 2, MARK, 3, 4], 0, 1), row([1, MARK, 2, MARK, 5, 6], 0, 1), row([1, MARK, 2, MARK, 5, 6], 1, 0)]
    early = row([1, MARK, 2, MARK, 5, 6], 0, 1, supervised_from=2)  # answers between the pictures
    joint = share_pictures([*rows, early], MARK, TOKENS, 50)
    assert [r.ids.tolist() for r in joint][0] == [1, MARK, 2, MARK, 3, 4, 5, 6] and len(joint) == 3
    assert joint[0].segments.tolist() == [0, 0, 0, 0, 1, 1, 2, 2] and joint[0].images == (0, 1) and joint[0].length(TOKENS) == 14


def test_rows_are_packed_by_best_fit_and_no_first_token_is_a_target():
    rows = [row([1] * 6), row([MARK, 2], 4), row([3] * 3, supervised_from=0), row([4] * 7), row([5] * 11), row([6] * 2)]
    packed = pack_rows(rows, TOKENS, 10)
    assert [r.ids.tolist() for r in packed] == [[1] * 6 + [6] * 2, [MARK, 2], [3] * 3 + [4] * 7, [5] * 11]
    assert [r.images for r in packed] == [(), (4,), (), ()] and [r.length(TOKENS) for r in packed] == [8, 5, 10, 11]
    assert packed[2].segments.tolist() == packed[2].roots.tolist() == [0] * 3 + [1] * 7
    assert packed[2].supervised.tolist() == [False, True, True] + [False] * 6 + [True]
    assert pack_rows(packed, TOKENS, 10) == packed


def test_packing_of_many_rows_leaves_little_room_and_loses_nothing():
    rng = np.random.default_rng(0)
    rows = [row([int(n)] * int(n)) for n in rng.integers(3, 200, 3000)]
    packed = pack_rows(rows, TOKENS, 512)
    assert sorted(np.concatenate([r.ids for r in packed])) == sorted(np.concatenate([r.ids for r in rows]))
    assert max(len(r.ids) for r in packed) <= 512
    assert len(packed) <= 1.01 * sum(len(r.ids) for r in rows) / 512 + 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three pictures with three records each, one question in a record, and a record without a picture."""
    folder = tmp_path_factory.mktemp("world")
    path = write_conversations(folder, 3, text_only=1)
    write_clip(folder / "clip")
    records = []
    for record in json.loads(path.read_text()):
        turns = record["conversations"]
        for number in range(0, len(turns), 2)[:3]:
            question, answer = turns[number : number + 2]
            text = question["value"].removeprefix("<image>\n")
            mark = "<image>\n" if "image" in record else ""
            pair = [{"from": "human", "value": mark + text}, answer]
            records.append({**record, "id": f"{record['id']}/{number}", "conversations": pair})
    path.write_text(json.dumps(records))
    mllm = build_mllm(MllmConfig(**recipe(folder)))
    return folder, path, mllm


def dataset_of(world, shared: bool, max_length: int = 256, packed: bool = False) -> ConversationDataset:
    folder, path, mllm = world
    image, tokens = mllm.settings.image, mllm.num_image_tokens
    arguments = [str(path)], folder / "images", mllm.tokenizer, image, BoxCodec(), tokens, max_length, shared, packed
    return ConversationDataset(*arguments, progress=False)


def loss_and_gradients(world, dataset, rows):
    mllm = world[2]
    collate = pixel_collator(dataset, mllm.model.config.image_token_id, mllm.tokenizer.pad_token_id)
    mllm.model.zero_grad()
    batch = collate([dataset[index] for index in rows])
    loss = mllm.model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in mllm.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, batch


def test_shared_rows_give_the_loss_and_the_gradients_of_their_records(world):
    apart, shared = dataset_of(world, False), dataset_of(world, True)
    assert len(apart) == 10 and len(shared) == 4 and apart.num_records == shared.num_records == 10
    assert shared.lengths.sum() < 0.75 * apart.lengths.sum()
    loss, gradients, batch = loss_and_gradients(world, apart, range(10))
    joint_loss, joint_gradients, joint_batch = loss_and_gradients(world, shared, range(4))
    assert batch["attention_mask"].ndim == 2 and joint_batch["attention_mask"].ndim == 4
    assert joint_loss == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == joint_gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(joint_gradients[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("shared", [False, True])
def test_packed_rows_give_the_loss_and_the_gradients_of_their_records(world, shared):
    apart, packed = dataset_of(world, False), dataset_of(world, shared, 256, packed=True)
    assert len(packed) == 3 - shared and packed.num_records == 10 and max(packed.lengths) <= 256
    assert sum(len(packed[i].images) for i in range(len(packed))) == (3 if shared else 9)
    loss, gradients, _ = loss_and_gradients(world, apart, range(10))
    packed_loss, packed_gradients, batch = loss_and_gradients(world, packed, range(len(packed)))
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    for name, value in gradients.items():
        torch.testing.assert_close(packed_gradients[name], value, rtol=1e-4, atol=1e-6, msg=name)
    blind = {**batch, "attention_mask": (batch["input_ids"] >= 0).long()}  # as if documents saw each other
    with torch.no_grad():
        assert abs(world[2].model(**blind).loss.item() - loss) > 1e-3


def test_a_picture_with_more_than_fits_has_several_rows(world):
    short = dataset_of(world, True, max_length=25 + 70)
    assert 4 < len(short) < 10 and short.num_cut == 0 and max(short.lengths) <= 95
    _, gradients, _ = loss_and_gradients(world, short, range(len(short)))
    _, expected, _ = loss_and_gradients(world, dataset_of(world, False), range(10))
    torch.testing.assert_close(gradients["lm_head.weight"], expected["lm_head.weight"], rtol=1e-4, atol=1e-6)


def test_what_does_not_go_with_joint_rows_is_refused(world):
    with pytest.raises(DataError, match="pack needs a mask that attention eager does not take"):
        MllmConfig(**recipe(world[0], pack=True, attention="eager"))
    with pytest.raises(DataError, match="group_by_length has nothing to do"):
        MllmConfig(**recipe(world[0], pack=True, group_by_length=True))
    with pytest.raises(DataError, match="share_pictures needs a mask that attention eager does not take"):
        MllmConfig(**recipe(world[0], share_pictures=True, attention="eager"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"sliding_window": None}, True),
        ({"sliding_window": 100}, True),
        ({"sliding_window": 99}, False),
        ({"sliding_window": 8, "use_sliding_window": False}, True),
        ({"sliding_window": 8, "layer_types": ["full_attention", "full_attention"]}, True),
        ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"layer_types": ["full_attention", "linear_attention"]}, False),
    ],
)
def test_which_language_models_see_all_of_a_row(fields, expected):
    assert attends_to_all(SimpleNamespace(**fields), 100) is expected


def test_a_model_with_a_window_shorter_than_a_row_is_refused(world, monkeypatch):
    monkeypatch.setattr("mllm.model.attends_to_all", lambda config, length: length <= 128)
    assert build_mllm(MllmConfig(**recipe(world[0], share_pictures=True, max_length=128)))
    for field in ("share_pictures", "pack"):
        with pytest.raises(DataError, match=f"{field} is true, .* do not see all of a row of 129"):
            build_mllm(MllmConfig(**recipe(world[0], max_length=129, **{field: True})))


@pytest.mark.parametrize(
    "more",
    [
        {"share_pictures": True},
        {"share_pictures": True, "group_by_length": True, "gradient_accumulation": 2, "cache_features": True},
        {"pack": True},
    ],
)
def test_training_on_joint_rows_resumes_bit_equal(world, tmp_path, more):
    fields = recipe(world[0], batch_size=2, epochs=1, max_steps=4, **more)
    whole = train(MllmConfig(**fields | {"output": str(tmp_path / "whole")}))
    part = tmp_path / "part"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("checkpoint-4", "grounding.json", "*.safetensors"))
    for name in ("model.safetensors",):
        shutil.copy(whole / "checkpoint-2" / name, part / "checkpoint-2" / name)
    train(MllmConfig(**fields | {"output": str(part)}))
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, part))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_run_from_before_the_field_existed_is_not_gone_on_with_shared_rows(world, tmp_path):
    config = MllmConfig(**recipe(world[0], share_pictures=True))
    saved = {name: value for name, value in config.identity().items() if name != "share_pictures"}
    (tmp_path / "run.json").write_text(json.dumps(saved))
    with pytest.raises(DataError, match="made with share_pictures = False, this run has True"):
        check_identity(tmp_path, config)
