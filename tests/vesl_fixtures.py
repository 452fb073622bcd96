"""Small randomly drawn detectors and captioners, saved with their own processors and loaded like any checkpoint."""

import string

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SwinConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

OWL_SIZE, PATCH = 32, 8
WORDS = ("a", "the", "red", "blue", "bus", "heart", "apple", "dog", "large", "small", "of", "two")


def clip_tokenizer(max_length: int = 16) -> CLIPTokenizer:
    """One token a letter. The end has the highest id, where CLIP's text tower reads, and padding is id 0, as OWL's is."""
    letters = string.ascii_lowercase + string.digits + ".,'"
    tokens = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token="!", model_max_length=max_length)


def bert_tokenizer() -> BertTokenizer:
    """Whole words, then letters; the special tokens have the ids that Grounding DINO's attention mask looks for."""
    vocab = {f"[unused{index}]": index for index in range(1030)}
    for token, index in {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}.items():
        del vocab[f"[unused{index}]"]
        vocab[token] = index
    letters = string.ascii_lowercase
    more = dict.fromkeys([*WORDS, *letters, *(f"##{letter}" for letter in letters)])
    vocab |= {token: 1030 + index for index, token in enumerate(more)}
    return BertTokenizer(vocab=vocab, model_max_length=512)


def save_owl(folder, kind: str = "owlv2", seed: int = 0):
    """An OWLv2 or OWL-ViT (`kind`) of 4 x 4 patches, with heads drawn wide enough for boxes of every confidence."""
    config_class, model_class, processor_class, image_class = {
        "owlv2": (Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor, Owlv2ImageProcessorPil),
        "owlvit": (OwlViTConfig, OwlViTForObjectDetection, OwlViTProcessor, OwlViTImageProcessorPil),
    }[kind]
    tokenizer = clip_tokenizer()
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1,
        "pad_token_id": 0,
    }
    vision = {"image_size": OWL_SIZE, "patch_size": PATCH}
    config = config_class(text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=32)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for module in (model.class_head, model.box_head):
            for parameter in module.parameters():
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    processor_class(image_class(size={"height": OWL_SIZE, "width": OWL_SIZE}), tokenizer).save_pretrained(folder)
    return folder


def save_grounding_dino(folder, seed: int = 0, max_text_len: int = 64):
    """A Grounding DINO of 12 boxes and as few layers as there can be."""
    tokenizer = bert_tokenizer()
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        d_model=32,
        num_queries=12,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_text_len=max_text_len,
    )
    torch.manual_seed(seed)
    GroundingDinoForObjectDetection(config).eval().save_pretrained(folder)
    image_processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB picture of blurred noise."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (5, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((width, height), Image.Resampling.BICUBIC)


# ---- captioners

CAPTION_TOKENS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
]
CAPTION_WORDS = ["describe", "this", "image", "in", "detail", ".", "user", "assistant", ":", "a", "picture", "of", "found", "as"]
CHAT_TEMPLATE = (
    "{% for message in messages %}user : {% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} assistant :{% endfor %}"
)


def word_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Whole words, among them 40 that say nothing, for random models to write."""
    vocab = {token: index for index, token in enumerate([*CAPTION_TOKENS, *CAPTION_WORDS, *(f"w{i}" for i in range(40))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=CAPTION_TOKENS[4:], padding_side="right", **options
    )


def widen(model):
    """Weights drawn wide, so that a random model says different things of different images."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def save_llava(folder):
    """A LLaVA on a CLIP of 4 x 4 patches."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", "<image>")
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**layers, image_size=32, patch_size=8, projection_dim=32),
        text_config=LlamaConfig(
            **layers, vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2
        ),
        image_token_index=4,
        vision_feature_layer=-1,
    )
    widen(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    return folder


def save_qwen(folder):
    """A Qwen2-VL: as many tokens as an image is large, so that prompts differ in length. Saved part by part, as it is without
    torchvision, which its processor for videos needs."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
    marks = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    model = widen(Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **marks)))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=16 * 16, max_pixels=64 * 64, patch_size=8).save_pretrained(folder)
    return folder


def save_blip(folder):
    """A BLIP, with BERT's tokens and BLIP's own start token."""
    tokenizer = bert_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={
            **layers,
            "encoder_hidden_size": 32,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": 102,
            "sep_token_id": 102,
            "pad_token_id": 0,
        },
        vision_config={**layers, "image_size": 32, "patch_size": 8},
    )
    widen(BlipForConditionalGeneration(config)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder
