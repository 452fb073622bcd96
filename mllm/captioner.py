"""A trained MLLM as the captioner of `encoder.vesl`: any folder with a `grounding.json`, also with region tokens, an adapter
or low bits, which transformers alone would not read."""

from pathlib import Path

import torch
from PIL import Image

from encoder.pretrained import weights_hash
from encoder.vesl.captioner import ALT_TEXT, CHAT_PROMPT
from mllm.generation import GroundingModel


class MllmCaptioner:
    """As `encoder.vesl.captioner.Captioner`; one call is one batch.

    model: an MLLM; prompt, max_new_tokens: as there; checkpoint: named by `describe`
    """

    def __init__(self, model: GroundingModel, prompt: str | None = None, max_new_tokens: int = 96, checkpoint: str = ""):
        self.model, self.prompt = model, CHAT_PROMPT if prompt is None else prompt
        self.max_new_tokens, self.checkpoint = max_new_tokens, checkpoint

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        prompt: str | None = None,
        max_new_tokens: int = 96,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "MllmCaptioner":
        """A folder written by `scripts/finetune_mllm.py`."""
        return cls(GroundingModel.from_pretrained(path, device, dtype), prompt, max_new_tokens, str(path))

    def caption(self, images: list[Image.Image], alt_texts: list[str]) -> list[str]:
        """RGB images and the text that each was found with ("" if none) -> a caption of each, in one line."""
        prompts = [self.prompt.replace(ALT_TEXT, alt_text) for alt_text in alt_texts]
        answers = self.model.generate(
            images, prompts, batch_size=max(1, len(images)), max_new_tokens=self.max_new_tokens, progress=False
        )
        return [" ".join(answer.split()) for answer in answers]

    def describe(self) -> dict:
        """Everything that decides what is written, as JSON can hold it."""
        return {
            "captioner": "mllm",
            "checkpoint": self.checkpoint,
            "weights": weights_hash(self.model.model),
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
        }
