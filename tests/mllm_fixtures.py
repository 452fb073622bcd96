"""A small world for the MLLM's tests: pictures of coloured squares, conversations about them, and a tiny CLIP folder."""

import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPModel

from encoder.tokenizer import train_text_tokenizer

COLOURS = {"red square": (220, 30, 30), "blue square": (30, 30, 220), "green square": (30, 180, 30)}


def write_conversations(folder: Path, count: int, seed: int = 0, text_only: int = 0) -> Path:
    """`count` pictures with two squares each, and records of four turns; `text_only` records more without a picture."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        width, height = rng.choice([(60, 40), (40, 60), (50, 50)])
        picture = Image.new("RGB", (width, height), (200, 200, 200))
        regions, turns = [], []
        for slot, name in enumerate(rng.sample(list(COLOURS), 2)):
            side = rng.randrange(12, 18)
            x = rng.randrange(0, width - side)
            y = slot * height // 2 + rng.randrange(0, max(1, height // 2 - side))
            ImageDraw.Draw(picture).rectangle([x, y, x + side - 1, y + side - 1], fill=COLOURS[name])
            regions.append({"box": [x, y, x + side, min(y + side, height)]})
            turns += [
                [{"from": "human", "value": f"Where is the {name}?"}, {"from": "gpt", "value": f"<box:{slot}>"}],
                [{"from": "human", "value": f"What is <region:{slot}>?"}, {"from": "gpt", "value": name}],
            ]
        rng.shuffle(turns)
        conversation = [turn for pair in turns for turn in pair]
        conversation[0]["value"] = "<image>\n" + conversation[0]["value"]
        picture.save(folder / "images" / f"{seed}_{index:04d}.png")
        records.append(
            {
                "id": f"scene{index}",
                "image": f"{seed}_{index:04d}.png",
                "width": width,
                "height": height,
                "conversations": conversation,
                "regions": regions,
            }
        )
    for index in range(text_only):
        turns = [{"from": "human", "value": "What is a square?"}, {"from": "gpt", "value": "four equal sides"}]
        records.append({"id": f"text{index}", "conversations": turns})
    path = folder / f"conversations_{seed}.json"
    path.write_text(json.dumps(records))
    return path


def write_clip(folder: Path, width: int = 32, image_size: int = 40, patch: int = 8, seed: int = 0) -> Path:
    """A stock CLIPModel folder with random weights and its tokenizer."""
    texts = ["red square", "blue square", "green square"]
    tokenizer = train_text_tokenizer(texts, 128, 16)
    vision = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch,
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "max_position_embeddings": 16,
    }
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    model.vision_model.embeddings.position_embedding.weight.data.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(folder: Path, **fields) -> dict:
    """Fields of a run that takes seconds."""
    values = {
        "data": [str(folder / "conversations_0.json")],
        "images": str(folder / "images"),
        "output": str(folder / "run"),
        "llm_preset": "nano",
        "llm_width": 32,
        "llm_layers": 2,
        "llm_heads": 2,
        "vocab_size": 400,
        "max_length": 256,
        "batch_size": 4,
        "max_steps": 4,
        "log_every": 1,
        "save_every": 2,
        "report_to": "none",
        "precision": "fp32",
    }
    if "model" not in fields:
        values["tower"] = str(folder / "clip")
    if "model" in fields or fields.get("llm"):
        for name in ("llm_preset", "llm_width", "llm_layers", "llm_heads", "vocab_size"):
            values.pop(name)
    return values | fields
