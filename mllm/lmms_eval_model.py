"""An MLLM folder as a model of lmms-eval, which then runs MME, POPE, GQA, TextVQA and its other tasks on one picture:

    python -m lmms_eval --model open_cloc --model_args pretrained=runs/mllm --batch_size 8 --tasks mme,pope,gqa,textvqa_val

lmms-eval finds it by the entry point `lmms_eval.models`. Its own RefCOCO tasks measure boxes in another frame: use
`eval/refcoco.py` for those. Needs the package lmms-eval; docs/evaluation.md says how to have it without a GPU.
"""

import os

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image

from encoder.errors import DataError
from mllm.conversation import IMAGE
from mllm.generation import GroundingModel
from mllm.likelihood import answer_scores

MAX_NEW_TOKENS = 1024  # where a task does not say


class OpenClocModel(lmms):
    """lmms-eval's "simple" interface: (context, ..., doc_to_visual, doc_id, task, split) in a request's `args`."""

    is_simple = True

    def __init__(self, pretrained: str, device: str | None = None, dtype: str = "float32", batch_size: int = 1, **unknown):
        super().__init__()
        if unknown:
            raise DataError(f"model_args has {', '.join(sorted(unknown))}; known are pretrained, device, dtype and batch_size")
        local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or local)
        self.model = GroundingModel.from_pretrained(pretrained, self.device, getattr(torch, dtype))
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer per request, cut at the first of its `until`; greedy, which is all these tasks ask for."""
        answers: list[str] = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            _, wanted, *where = request.args
            if (wanted.get("do_sample") and wanted.get("temperature")) or (wanted.get("num_beams") or 1) > 1:
                raise DataError(f"task {where[2]} asks for sampling or beams; this model decodes greedily, so set neither")
            by_length.setdefault(int(wanted.get("max_new_tokens", MAX_NEW_TOKENS)), []).append(index)
        for length, indices in by_length.items():
            rows = [self._question(requests[index]) for index in indices]
            images, questions = [image for image, _ in rows], [question for _, question in rows]
            texts = self.model.generate(images, questions, None, self.batch_size, length, progress=self.rank == 0)
            for index, text in zip(indices, texts, strict=True):
                context, wanted = requests[index].args[:2]
                until = wanted.get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                answers[index] = text
                self.cache_hook.add_partial("generate_until", (context, wanted), text)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(minus the logarithm of the continuation's probability, whether greedy decoding would say it) per request.

        Minus, since lmms-eval's multiple choice takes the smallest: its models return losses here. Wrapped, since its
        evaluator (0.7) makes a string of any other result that is none.
        """
        rows = []
        for request in requests:
            _, continuation, _, doc_id, task, split = request.args
            if not isinstance(continuation, str):
                continuation = continuation(self.task_dict[task][split][doc_id])
            image, question = self._question(request)
            rows.append((image, question, [], continuation.strip()))
        return [GenerationResult((-value, greedy)) for value, greedy in answer_scores(self.model, rows, self.batch_size)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise DataError("this model answers tasks of one round; leave multi-round tasks out")

    def _question(self, request: Instance) -> tuple[Image.Image, str]:
        """The one picture and the question of a request."""
        doc_to_visual, doc_id, task, split = request.args[2:]
        pictures = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(pictures) != 1 or not isinstance(pictures[0], Image.Image):
            raise DataError(f"task {task}, document {doc_id}: {len(pictures)} visuals; this model answers about one picture")
        return pictures[0].convert("RGB"), request.args[0].replace(IMAGE, "").strip()


def manifest():
    """What the entry point `lmms_eval.models` gives to lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("open_cloc", simple_class_path=f"{__name__}.{OpenClocModel.__name__}")
