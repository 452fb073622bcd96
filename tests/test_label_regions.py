"""label_regions.py with real, small models: a whole collection through BLIP, OWLv2 and CLOC, and a CLOC trained on the labels."""

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from labelling_fixtures import contents, encoded, members, records, write_tar
from vesl_fixtures import save_blip, save_owl

from encoder.data.reader import RegionDataset
from encoder.errors import DataError
from encoder.model import ClocModel
from encoder.pretrained import load_strict
from encoder.vesl.captioner import Captioner
from mllm.captioner import MllmCaptioner

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(
        not all(map(find_spec, ("spacy", "nltk", "scipy"))), reason="spaCy, NLTK or SciPy (extra vesl) is not here"
    ),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"blip": save_blip(folder / "blip"), "owl": save_owl(folder / "owl")}


def main(monkeypatch, *arguments) -> None:
    script = ROOT / "scripts/label_regions.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script))["main"]()


def test_captions_phrases_boxes_and_statistics_of_real_models(region_shards, models, tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    flags = ["--captioner", models["blip"], "--max-new-tokens", 12, "--detector", models["owl"], "--image-size", 32]
    flags += ["--caption-batch", 5, "--min-score", 0.4]
    main(monkeypatch, region_shards, out, *flags, "--stats", "--tokenizer", tiny_folder, "--samples", 3)
    said = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())["counts"]
    assert summary["shards"] == 2 and summary["records"] == 24
    assert f"24 images with {summary['regions']} regions in 2 of 2 shards are in {out}" in said.splitlines()[-1]
    found = json.loads((out / "statistics.json").read_text())
    assert found["images"] == 24 and found["regions"] == summary["regions"] and found["tokenizer"] == str(tiny_folder)
    assert (out / "samples.html").read_text().count('class="card"') == 3
    manifest = json.loads((out / "manifest.json").read_text())["stages"]
    assert len(manifest["captions"]["part"]["weights"]) == len(manifest["detections"]["part"]["weights"]) == 64
    assert manifest["captions"]["settings"]["max_new_tokens"] == 12
    before = contents(out)
    main(monkeypatch, region_shards, out, *flags)  # all is done
    assert contents(out) == before
    with pytest.raises(DataError, match=r"holds detections of other settings \(min_score: 0.4 there, 0.5 asked\)"):
        main(monkeypatch, region_shards, out, *flags, "--min-score", 0.5)


def test_labels_feed_pretraining_unchanged(region_shards, models, tmp_path, monkeypatch):
    out, run = tmp_path / "labelled", tmp_path / "run"
    main(
        monkeypatch,
        region_shards,
        out,
        "--captioner",
        "keep",
        "--detector",
        models["owl"],
        "--image-size",
        32,
        "--min-score",
        0.4,
    )
    dataset = RegionDataset(out, progress=False)
    assert len(dataset) == 24 and sum(len(dataset.record(index).regions) for index in range(24)) > 24
    flags = ["--preset", "tiny", "--vocab_size", 96, "--batch_size", 4, "--steps", 3, "--warmup_steps", 1, "--precision", "fp32"]
    command = [sys.executable, ROOT / "scripts/pretrain_encoder.py", "--shards", out, "--output", run, *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    load_strict(ClocModel, run / "model")
    losses = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert losses and all(line["region_loss"] > 0 and line["grounding_loss"] > 0 for line in losses)


def test_a_cloc_labels_and_so_does_the_baseline(region_shards, models, tiny_folder, tmp_path, monkeypatch):
    main(monkeypatch, region_shards, tmp_path / "cloc", "--captioner", "keep", "--detector", tiny_folder, "--min-score", -0.9)
    assert sum(len(record["regions"]) for record in records(tmp_path / "cloc").values()) > 0
    write_tar(tmp_path / "in/x.tar", {"a.jpg": encoded(), "a.txt": b"photo of a red dog"})
    main(monkeypatch, tmp_path / "in", tmp_path / "ngrams", "--labels", "ngrams", "--detector", models["owl"], "--image-size", 32)
    (record,) = records(tmp_path / "ngrams").values()
    assert "a red dog" in record["queries"] and "photo" not in " ".join(record["queries"]) and "captions" not in record
    assert all(region["score"] > 0.3 and region["source"] == "ngrams" for region in record["regions"])
    assert json.loads((tmp_path / "ngrams/manifest.json").read_text())["stages"]["detections"]["settings"]["min_score"] == 0.3
    assert members(tmp_path / "ngrams/x.tar")["a.txt"] == b"photo of a red dog"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--labels", "ngrams", "--captioner", "keep"], "leave --captioner out"),
        (["--captioner", "keep", "--prompt", "What?"], "the captions are kept as they are; leave prompt out"),
        (["--captioner", "keep", "--max-phrases", "0"], "max_phrases is 0; give at least 1"),
        (["--detector", "nowhere/at-all"], "nowhere/at-all is no model that can be read"),
        (["--captioner", "keep", "--stats", "--tokenizer", "nowhere/at-all"], "name another, or its folder, with --tokenizer"),
        (["--captioner", "keep", "--engine", "ray", "--workers", "0"], "workers is 0"),
        (["--stages", "captions"], "the stage captions is to run, and nothing was given to run it"),
        (["--stages", "caption"], "no stage 'caption' here; choose among captions, phrases, detections, shards"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(region_shards, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=sentence) as error:
        main(monkeypatch, region_shards, tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "out/stages").exists()


def test_an_mllm_of_ours_is_read_by_its_own_class(region_shards, tmp_path, monkeypatch):
    """With its region tokens, adapter or low bits, which transformers alone would not read."""
    (tmp_path / "mllm").mkdir()
    (tmp_path / "mllm/grounding.json").write_text("{}")
    for folder, cls in ((tmp_path / "mllm", MllmCaptioner), (tmp_path, Captioner)):
        monkeypatch.setattr(sys, "argv", ["label_regions.py", "in", "out", "--captioner", str(folder), "--dtype", "bfloat16"])
        script = runpy.run_path(str(ROOT / "scripts/label_regions.py"))
        captioner = script["make_job"](script["parse_arguments"]()).captioner
        assert captioner.make.args[0] is cls and captioner.settings == {"captioner": str(folder), "dtype": "bfloat16"}


def test_a_clocs_input_is_its_own(region_shards, models, tiny_folder, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="is a CLOC, which has its own input and no templates; leave image_size out"):
        main(monkeypatch, region_shards, tmp_path / "out", "--detector", tiny_folder, "--image-size", 32)
    with pytest.raises(DataError, match="is no CLOC and makes its own proposals"):
        main(monkeypatch, region_shards, tmp_path / "out", "--detector", models["owl"], "--proposals", "windows")
