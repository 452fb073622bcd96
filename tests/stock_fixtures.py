"""Stock LLaVA folders as the model hub has them, tiny and with random weights, and what stock transformers answers on them."""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from huggingface_hub import save_torch_state_dict
from mllm_fixtures import write_conversations
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

from encoder.processor import OPENAI_MEAN, OPENAI_STD

SIZE, PATCH = 40, 8
GRIDS = [[40, 80], [80, 40], [80, 80], [120, 40], [40, 120]]  # heights and widths, px
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions. "
)
# What a hub's processor renders: turns with their roles in capitals, pictures first, no system turn of its own.
CHAT = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def write_stock(folder: Path, kind: str = "llava", seed: int = 0) -> Path:
    """llava-1.5-7b-hf (or `llava_next`: v1.6-vicuna) but for its size: float16 shards under transformers 4's names."""
    folder.mkdir(parents=True)
    texts = ["USER: ASSISTANT: [0.12, 0.34, 0.56, 0.78] where is the red square left of the blue one?", SYSTEM]
    model = io.BytesIO()
    fields = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "split_digits": True, "pad_id": 3}
    fields |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}  # Llama's
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(20 * texts), model_writer=model, hard_vocab_limit=False, minloglevel=2, num_threads=1, **fields
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **words}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE, patch_size=PATCH
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer) + 16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    ids = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    if kind == "llava":
        config = LlavaConfig(
            vision_config=vision, text_config=text, vision_feature_layer=-2, **ids
        )  # image_seq_length stays 576, which it is not
        model = LlavaForConditionalGeneration(config)
    else:
        config = LlavaNextConfig(
            vision_config=vision, text_config=text, vision_feature_layer=-2, image_grid_pinpoints=GRIDS, **ids
        )
        model = LlavaNextForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "position_embedding" in name or "projector" in name or "patch_embedding" in name:
            parameter.data.normal_(std=0.5)  # answers then depend on the picture
    model.half()
    config.dtype = torch.float16
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    state = {classic(name): value for name, value in model.state_dict().items()}
    save_torch_state_dict(state, folder, max_shard_size="100KB")
    crop = {"height": SIZE, "width": SIZE}
    images = {
        "image_processor_type": "CLIPImageProcessor" if kind == "llava" else "LlavaNextImageProcessor",
        "do_center_crop": True, "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "size": {"shortest_edge": SIZE}, "crop_size": crop, "image_mean": OPENAI_MEAN, "image_std": OPENAI_STD, "resample": 3,
        **({} if kind == "llava" else {"image_grid_pinpoints": GRIDS}),
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    words = {"image_token": "<image>", "patch_size": PATCH, "vision_feature_select_strategy": "default"}
    (folder / "processor_config.json").write_text(json.dumps({**words, "num_additional_image_tokens": 1}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    return folder


def classic(name: str) -> str:
    """The name that transformers 4 gave a parameter."""
    name = name.removeprefix("model.")
    name = name.replace("vision_tower.", "vision_tower.vision_model.").replace("language_model.", "language_model.model.")
    return f"language_model.{name}" if name.startswith("lm_head.") else name


class StockReference:
    """Stock transformers alone: its processor with LLaVA's padding to a square, its model, its generate."""

    def __init__(self, folder: Path):
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        tiles = self.model.config.model_type == "llava_next"
        sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=GRIDS, **sizes) if tiles else None
        self.processor = (LlavaNextProcessor if tiles else LlavaProcessor)(
            images or LlavaImageProcessorPil(do_pad=True, **sizes),
            AutoTokenizer.from_pretrained(folder),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )

    @torch.no_grad()
    def answer(self, image: Image.Image, question: str, max_new_tokens: int) -> str:
        inputs = self.processor(images=image, text=f"{SYSTEM}USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
        out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def pictures(folder: Path) -> list[Image.Image]:
    """Wide, tall and square ones."""
    write_conversations(folder, 6)
    return [Image.open(path).convert("RGB") for path in sorted((folder / "images").glob("*.png"))]
