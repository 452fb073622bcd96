"""What `scripts/pretrain_encoder.py` starts from: the temperature and the biases of the sigmoid loss."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from encoder.config import tiny
from encoder.errors import DataError
from encoder.export import export_clip
from encoder.losses import LossConfig
from encoder.model import ClocModel
from encoder.pretraining_config import PretrainConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain_encoder.py"


@pytest.fixture(scope="module")
def make_model():
    return runpy.run_path(str(SCRIPT))["make_model"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, request):
    """A CLIP with OpenAI's temperature, a CLOC with the same, and a CLOC trained with the sigmoid loss; tokenizers left out."""
    base = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    model = ClocModel(tiny(vocab_size=64))
    model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(base / "cloc")
    export_clip(model, base / "clip")
    sigmoid = ClocModel(tiny(vocab_size=64, logit_bias_init_value=-10.0))
    sigmoid.logit_scale.data.fill_(3.0), sigmoid.logit_bias.data.fill_(-8.0)
    sigmoid.save_pretrained(base / "sigmoid")
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
def test_temperature_and_bias_at_the_start(folders, make_model, monkeypatch, name, contrastive, scale, bias):
    monkeypatch.setitem(make_model.__globals__, "load_processor", lambda folder: None)
    config = PretrainConfig(shards="", output="", init=str(folders / name))
    model, _ = make_model(config, LossConfig(contrastive=contrastive), None)
    assert float(model.logit_scale.exp()) == pytest.approx(scale, rel=1e-3)
    assert (model.logit_bias is None) if bias is None else (float(model.logit_bias) == bias)


def test_a_temperature_above_the_ceiling_is_refused_before_the_first_step_cuts_it(folders, make_model, monkeypatch):
    monkeypatch.setitem(make_model.__globals__, "load_processor", lambda folder: None)
    config = PretrainConfig(shards="", output="", init=str(folders / "clip"))
    with pytest.raises(DataError, match="1/temperature is 100.0, above max_logit_scale 50.*--max_logit_scale 121"):
        make_model(config, replace(LossConfig(), max_logit_scale=50.0), None)
