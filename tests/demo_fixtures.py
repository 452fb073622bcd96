"""What the tests of the demo share: a tiny MLLM folder with random weights, and a chat on a grey picture."""

from pathlib import Path

import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from PIL import Image

from demo.session import Session
from mllm.checkpoint import save_mllm
from mllm.config import MllmConfig
from mllm.model import build_mllm


def write_mllm(folder: Path) -> Path:
    """An MLLM with random weights: what it says is noise, how it is asked is real."""
    write_conversations(folder, 2)
    write_clip(folder / "clip")
    mllm = build_mllm(MllmConfig(**recipe(folder)))
    save_mllm(folder / "mllm", mllm.model, mllm.tokenizer, mllm.settings, torch.float32, None, mllm.sentencepiece_model)
    return folder / "mllm"


def grey_chat() -> Session:
    """A chat about a grey picture of 80 x 40 px."""
    session = Session()
    session.start(Image.new("RGB", (80, 40), (120, 120, 120)))
    return session


def rgb(hexadecimal: str) -> tuple[int, int, int]:
    return tuple(int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
