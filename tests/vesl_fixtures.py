"""Small randomly drawn detectors, saved in Hugging Face's format with their own processors and loaded like any checkpoint."""

import string

import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

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
