"""What the tests of the encoder's evaluations share: a stock CLIP folder, pictures, and a way to run a command."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from encoder.pretrained import load_encoder, load_processor


def save_stock_clip(cloc_folder, folder):
    """The CLIP inside a CLOC folder, as transformers itself saves one."""
    cloc = load_encoder(cloc_folder)
    texts, vision = cloc.config.text_config.to_dict(), cloc.config.vision_config.to_dict()
    clip = CLIPModel(CLIPConfig(text_config=texts, vision_config=vision, projection_dim=cloc.config.projection_dim))
    clip.load_state_dict({key: value for key, value in cloc.state_dict().items() if key in clip.state_dict()})
    clip.save_pretrained(folder)
    load_processor(cloc_folder).tokenizer.save_pretrained(folder)
    return folder


def write_picture(path, width, height, seed):
    """A picture of noise, in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def run(module, *arguments):
    """Runs an evaluation's `main` in this process; user errors come as the exceptions they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        module.main()


def naive_recall(similarity, right, k):
    """Mean over queries of the recall at k under 200 random orders of candidates with equal scores; plain loops.

    similarity: (Q, C) float64; right: per query the set of right candidates
    """
    rng, hits = np.random.default_rng(0), []
    for row, wanted in zip(similarity, right, strict=True):
        found = 0
        for _ in range(200):
            order = sorted(range(len(row)), key=lambda c: (-row[c], rng.random()))
            found += any(c in wanted for c in order[:k])
        hits.append(found / 200)
    return float(np.mean(hits))
