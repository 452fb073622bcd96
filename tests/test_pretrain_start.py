"""What a pretraining run starts from: its configuration without weights, fields set by flags, temperature and biases."""

import argparse
from dataclasses import fields, replace

import pytest
import torch
from conftest import write_shards
from transformers import CLIPConfig, SiglipConfig, SiglipModel, T5Tokenizer

from encoder import start
from encoder.checkpoint import LATEST, TOKENIZER
from encoder.config import ClocConfig, tiny
from encoder.costs import encoder_cost, meta_encoder
from encoder.data.reader import RegionDataset
from encoder.errors import DataError
from encoder.export import export_clip
from encoder.from_clip import from_clip
from encoder.losses import LossConfig
from encoder.model import ClocModel
from encoder.pretraining_config import PretrainConfig, add_pretraining_flags, build_configs
from encoder.processor import ClocImageProcessor, ClocProcessor
from encoder.start import make_model, own_tokenizer, start_config, texts_of


@pytest.fixture()
def processor_of_any(monkeypatch):
    """The folders here have no tokenizer."""
    monkeypatch.setattr(start, "load_processor", lambda folder, tokenizer: ClocProcessor(ClocImageProcessor(size=32)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, request):
    """A CLIP with OpenAI's temperature, a CLOC with the same, one trained with the sigmoid loss, a SigLIP and a CLOC on it."""
    base = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    model = ClocModel(tiny(vocab_size=64, prompter_shared=True))
    model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(base / "cloc")
    export_clip(model, base / "clip")
    export_clip(model, base / "vecap")
    sigmoid = ClocModel(tiny(vocab_size=64, logit_bias_init_value=-10.0))
    sigmoid.logit_scale.data.fill_(3.0), sigmoid.logit_bias.data.fill_(-8.0)
    sigmoid.save_pretrained(base / "sigmoid")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 24, "projection_size": 32}
    siglip = SiglipModel(SiglipConfig(vision_config={**sizes, "image_size": 32, "patch_size": 8}, text_config=text))
    siglip.save_pretrained(base / "siglip")
    from_clip(base / "siglip", prompter_shared=True).save_pretrained(base / "cloc_siglip")
    return base


@pytest.mark.parametrize(
    ("name", "contrastive", "scale", "bias"),
    [
        ("clip", "softmax", 100.0, None),
        ("cloc", "softmax", 100.0, None),
        ("clip", "sigmoid", 10.0, -10.0),
        ("cloc", "sigmoid", 10.0, -10.0),
        ("sigmoid", "sigmoid", 20.0855, -8.0),
    ],
)
def test_temperature_and_bias_at_the_start(folders, processor_of_any, name, contrastive, scale, bias):
    config = PretrainConfig(shards="", output="", init=str(folders / name))
    model, _ = make_model(config, LossConfig(contrastive=contrastive), None)
    assert float(model.logit_scale.exp()) == pytest.approx(scale, rel=1e-3)
    assert (model.logit_bias is None) if bias is None else (float(model.logit_bias) == bias)


def test_a_temperature_above_the_ceiling_is_refused_before_the_first_step_cuts_it(folders, processor_of_any):
    config = PretrainConfig(shards="", output="", init=str(folders / "clip"))
    with pytest.raises(DataError, match="1/temperature is 100.0, above max_logit_scale 50.*--max_logit_scale 121"):
        make_model(config, replace(LossConfig(), max_logit_scale=50.0), None)


INITS = ("clip", "cloc", "sigmoid", "siglip", "cloc_siglip")


@pytest.mark.parametrize("contrastive", ["softmax", "sigmoid"])
@pytest.mark.parametrize("init", INITS)
def test_the_configuration_and_the_cost_are_known_without_the_weights(folders, processor_of_any, init, contrastive):
    """From any encoder: what the doctor reckons with is the model that the run then builds."""
    config = PretrainConfig(shards="", output="", init=str(folders / init), precision="fp32")
    model, _ = make_model(config, LossConfig(contrastive=contrastive), None)
    known = start_config(config, LossConfig(contrastive=contrastive))
    for part in (known, known.vision_config, known.text_config):  # loaded weights have one, a configuration need not
        part.dtype = torch.float32
    assert known.to_diff_dict() == model.config.to_diff_dict()
    meta = meta_encoder(config, LossConfig(contrastive=contrastive))
    assert type(meta) is type(model)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    cost = encoder_cost(meta, config)
    assert cost.flops(recompute=False) > 1e6 and cost.saved_bytes > 1e5


def test_every_field_that_cloc_adds_is_a_flag_and_reaches_the_model():
    """By construction: a field that is added to `ClocConfig` is a flag too, explained by its line in the docstring."""
    added = {field.name for field in fields(ClocConfig)} - {field.name for field in fields(CLIPConfig)}
    parser = argparse.ArgumentParser()
    add_pretraining_flags(parser)
    helps = {action.dest: action.help for action in parser._actions}
    assert len(added) >= 15 and all(len(helps[name].split(" (default ")[0]) > 20 for name in added)
    other = {"prompt": "mean", "all": "patches", "corners": "joint", "shared": "own", "pad": "squash", "normal": "sincos"}
    other |= {"prompter": "prompter", True: False, False: True, 4.0: 2.0, 0.5: 0.25, 32.0: 9.5, None: 24}
    chosen = {name: other[getattr(ClocConfig(), name)] for name in added}
    flags = [part for name, value in chosen.items() for part in (f"--{name}", str(value).lower())]
    values = vars(parser.parse_args(["--shards", "a", "--output", "b", "--preset", "tiny", *flags]))
    config, loss_config = build_configs(values)
    assert config.model_fields == chosen
    model_config = start_config(config, loss_config)
    assert {name: getattr(model_config, name) for name in added} == chosen


def test_geometry_is_one_for_the_model_and_its_pictures(folders, processor_of_any):
    for given, expected in (({}, "pad"), ({"geometry": "squash"}, "squash")):
        config = PretrainConfig(shards="", output="", init=str(folders / "cloc"), model_fields=given)
        model, processor = make_model(config, LossConfig(), None)
        assert model.config.geometry == processor.image_processor.geometry == expected


@pytest.mark.parametrize("init", ["cloc", "cloc_siglip"])
def test_of_one_prompter_become_two_that_start_from_it(folders, processor_of_any, init, tmp_path, capsys):
    """Nothing changes at the start, and both are saved."""
    given = {"prompter_shared": False}
    config = PretrainConfig(shards="", output="", init=str(folders / init), model_fields=given)
    model, _ = make_model(config, LossConfig(), None)
    assert "has one Prompter for boxes and texts" in capsys.readouterr().out
    start = type(model).from_pretrained(folders / init)
    tokens, index = torch.randn(2, 17 if init == "cloc" else 16, 32), torch.tensor([0, 1, 1])
    boxes, texts = torch.tensor([[0.1, 0.2, 0.5, 0.9]] * 3), torch.randn(3, start.config.projection_dim)
    assert torch.equal(start.embed_boxes(tokens, boxes, index), model.embed_boxes(tokens, boxes, index))
    assert torch.equal(start.embed_texts(tokens, texts, index), model.embed_texts(tokens, texts, index))
    fresh = start_config(config, LossConfig())
    assert {n: p.shape for n, p in type(model)(fresh).named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    model.save_pretrained(tmp_path)
    again, _ = make_model(replace(config, init=str(tmp_path)), LossConfig(), None)
    kept = again.state_dict()
    assert kept.keys() == model.state_dict().keys() and all(torch.equal(kept[n], v) for n, v in model.state_dict().items())
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match="has a Prompter of its own for texts, which prompter_shared true would drop"):
        make_model(replace(config, init=str(tmp_path), model_fields={"prompter_shared": True}), LossConfig(), None)


def test_fields_that_a_siglip_has_not_are_refused(folders):
    given = {"position_init": "sincos", "logit_bias_init_value": -10.0, "box_token": "joint"}
    config = PretrainConfig(shards="", output="", init=str(folders / "siglip"), model_fields=given)
    with pytest.raises(DataError, match="is a SigLIP, which has no logit_bias_init_value and no position_init; leave that out"):
        start_config(config, LossConfig())


def test_a_tokenizer_reads_each_source_by_its_weight(tmp_path, monkeypatch):
    """One source: every record once. Two: the first is not read before the second, whatever their sizes."""
    for name, count in (("large", 48), ("small", 16)):
        write_shards(tmp_path / name, count)
    seen, real = [], RegionDataset.record
    monkeypatch.setattr(RegionDataset, "record", lambda self, index: seen.append(index) or real(self, index))
    one = RegionDataset(tmp_path / "large", progress=False)
    list(texts_of(one, seed=0))
    assert seen == list(range(48))
    monkeypatch.setattr(start, "TOKENIZER_RECORDS", 20)
    seen.clear()
    (tmp_path / "mix.yaml").write_text(f"{tmp_path / 'large'}: 1\n{tmp_path / 'small'}: 3\n")
    list(texts_of(RegionDataset(tmp_path / "mix.yaml", progress=False), seed=0))
    of_large = [index for index in seen if index < 48]
    assert 2 <= len(of_large) <= 9 and len(seen) - len(of_large) > 8 and seen == sorted(set(seen))


def test_a_run_that_goes_on_keeps_its_tokenizer(tmp_path, capsys):
    config = PretrainConfig(shards="", output=str(tmp_path), vocab_size=200)
    first = own_tokenizer(config, RegionDataset(write_shards(tmp_path / "a", 8), progress=False), 24)
    assert f"the texts yield {len(first)} pieces of the 200 of vocab_size" in capsys.readouterr().out
    other = RegionDataset(write_shards(tmp_path / "b", 40), progress=False)
    fresh = own_tokenizer(config, other, 24)
    assert fresh.get_vocab() != first.get_vocab()
    fresh.save_pretrained(tmp_path / TOKENIZER)
    again = own_tokenizer(config, RegionDataset(tmp_path / "a", progress=False), 24)
    assert again.get_vocab() == first.get_vocab()  # no checkpoint yet, so it starts over
    (tmp_path / LATEST).parent.mkdir()
    (tmp_path / LATEST).write_text("step_00000001")
    kept = own_tokenizer(config, RegionDataset(tmp_path / "a", progress=False), 24)
    assert type(kept) is type(fresh) and kept.get_vocab() == fresh.get_vocab() and kept.model_max_length == 24


def test_a_given_tokenizer_is_taken_from_scratch_and_where_init_has_none(folders, tmp_path):
    """T5's form: its end is 1, its limit longer than the text tower; another end, and more pieces than said, are refused."""
    pieces = ["<pad>", "</s>", "<unk>", "▁red", "▁bus", *"▁abcdefgh"]
    t5 = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=3, model_max_length=512)
    t5.save_pretrained(tmp_path / "t5")
    scratch = PretrainConfig(shards="", output="", preset="tiny", vocab_size=len(t5), tokenizer=str(tmp_path / "t5"))
    continued = replace(scratch, init=str(folders / "vecap"))
    for config in (scratch, continued):
        model, processor = make_model(config, LossConfig(), None)
        ids = processor.texts(["Red bus", "bus " * 90])["input_ids"]
        assert ids[0, :3].tolist() == [3, 4, 1] and ids.shape == (2, 32) and ids[1, -1] == 1
        assert model.config.text_config.vocab_size >= len(t5) and model.encode_text(ids).isfinite().all()
    with pytest.raises(DataError, match="has no tokenizer; name the folder"):
        make_model(replace(continued, tokenizer=None), LossConfig(), None)
    with pytest.raises(DataError, match=f"has {len(t5)} ids, the text tower 9; .* from scratch give a vocab_size as large"):
        make_model(replace(scratch, vocab_size=9), LossConfig(), None)
    T5Tokenizer(vocab=[(p, 0.0) for p in pieces], extra_ids=3, eos_token="▁red").save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="ends a text with id 3, the text tower reads its feature at 1"):
        make_model(replace(scratch, tokenizer=str(tmp_path / "other")), LossConfig(), None)
