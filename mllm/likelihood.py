"""How likely an MLLM finds given answers: two names compared without generating either.

(B rows, L tokens of the longest, V vocabulary.)
"""

import torch
from PIL import Image

from encoder.errors import DataError
from mllm.conversation import IMAGE
from mllm.generation import GroundingModel


def answer_likelihoods(
    model: GroundingModel, rows: list[tuple[Image.Image, str, list, str]], batch_size: int = 32
) -> list[float]:
    """The natural logarithm of an answer's probability, the mark that ends it included, per row.

    rows: (picture, question, regions that it names, answer); rows side by side on one picture share nothing but its pixels
    """
    return [value for value, _ in answer_scores(model, rows, batch_size)]


@torch.inference_mode()
def answer_scores(
    model: GroundingModel, rows: list[tuple[Image.Image, str, list, str]], batch_size: int = 32
) -> list[tuple[float, bool]]:
    """As `answer_likelihoods`, each with whether greedy decoding would say this answer and end it."""
    tokens = [_ids(model, *row) for row in rows]
    found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(tokens[i][0]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        for i, value in zip(part, _batch(model, [tokens[i] for i in part], [rows[i] for i in part]), strict=True):
            found[i] = value
    return found


def _ids(model: GroundingModel, image: Image.Image, question: str, regions: list, answer: str) -> tuple[list[int], int]:
    """Tokens of the whole conversation, the picture's mark widened, and where the answer starts."""
    content = IMAGE + "\n" + model.question_text(image, question, regions)
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    options = {"tokenize": True, "return_dict": True}
    prompt = model.tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **options)["input_ids"]
    encoded = model.tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, **options)
    # What a template writes behind the mark that ends an answer, such as a newline, nobody says.
    whole = encoded["input_ids"][: len(encoded["assistant_masks"]) - encoded["assistant_masks"][::-1].index(1)]
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise DataError(
            f"the chat template does not write the answer '{answer}' behind its prompt; likelihoods need that it does"
        )
    mark = whole.index(model.image_token_id)
    image_length = model.num_image_tokens(image)
    return [*whole[:mark], *[model.image_token_id] * image_length, *whole[mark + 1 :]], len(prompt) - 1 + image_length


def _batch(model: GroundingModel, tokens: list[tuple[list[int], int]], rows: list[tuple]) -> list[tuple[float, bool]]:
    longest = max(len(ids) for ids, _ in tokens)
    ids_BL = torch.full((len(tokens), longest), model.tokenizer.pad_token_id)
    mask_BL = torch.zeros_like(ids_BL)
    for row, (ids, _) in enumerate(tokens):
        ids_BL[row, : len(ids)], mask_BL[row, : len(ids)] = torch.tensor(ids), 1
    device = model.model.device
    images, questions, regions, _ = zip(*rows, strict=True)
    more = model.picture_inputs(list(images)) | model.region_features(questions, images, regions)
    logits_BLV = model.model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), **more).logits
    values = []
    for row, (ids, start) in enumerate(tokens):
        log_V = logits_BLV[row, start - 1 : len(ids) - 1].float().log_softmax(-1)
        said = torch.tensor(ids[start:], device=device)
        values.append((float(log_V.gather(-1, said[:, None]).double().sum()), bool((log_V.argmax(-1) == said).all())))
    return values
