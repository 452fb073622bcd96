"""A judge of answers that needs no server: a language model's folder, run here."""

from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from encoder.errors import DataError
from encoder.pretrained import weights_hash
from eval.judge import Judge
from eval.processes import best_device


class LocalJudge(Judge):
    """A causal language model with a chat template, run here; `url` is the hash of its weights.

    folder: what transformers loads by its Auto classes, without code of its own
    """

    def __init__(self, folder: Path, cache: Path, temperature: float, max_tokens: int, device: str | None = None):
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.llm = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"--judge {folder} is no folder of a causal language model ({reason}); give another") from None
        if not self.tokenizer.chat_template:
            raise DataError(f"--judge {folder} has no chat template; give a model that was tuned for chats")
        super().__init__(f"weights {weights_hash(self.llm)}", Path(folder).resolve().name, cache, temperature, max_tokens)
        self.llm.to(device or best_device())

    @torch.inference_mode()
    def _ask(self, body: dict) -> str:
        inputs = self._inputs(body["messages"]).to(self.llm.device)
        draws = {"do_sample": True, "temperature": body["temperature"]} if body["temperature"] else {"do_sample": False}
        torch.manual_seed(0)  # the same reply to the same question
        output = self.llm.generate(**inputs, **draws, max_new_tokens=body["max_tokens"])
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _inputs(self, messages: list[dict]):
        options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": True, "return_tensors": "pt"}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError:  # a family without a system turn
            system, user = (message["content"] for message in messages)
            return self.tokenizer.apply_chat_template([{"role": "user", "content": f"{system}\n\n{user}"}], **options)
