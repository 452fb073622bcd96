"""A trained MLLM in Python: ask about a picture, get words and the boxes they speak of.

    chat = GroundingChat.from_pretrained("weights/mllm_cloc")
    answer = chat.ask(picture, "Where is the bus?")              # answer.text, answer.boxes, answer.phrases
    answer = chat.ask(picture, "What is <region>?", [(4, 43, 24, 68)])

Decoding is greedy unless a stream or a talk is given a temperature; in float32 an answer does not depend on what else is in
its batch.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

import torch
from PIL import Image

from encoder.errors import DataError
from mllm.checkpoint import load_mllm
from mllm.conversation import IMAGE
from mllm.generation import Box, GroundingModel
from mllm.packing import attends_to_all
from mllm.prefix_cache import CACHE, new_state

MAX_NEW_TOKENS = 128
_ASKED = re.compile(r"where (?:is|are) (.+?)[?.! ]*$", re.IGNORECASE | re.DOTALL)
_BREAK = re.compile(r"[.,;:!?\n]")
# Words around a box that are not what it is a box of: "there is a cat at [...] and a dog [...]".
_FILLERS = frozenset(
    "and or then there here it they this that is are was were at in on with near by behind under to of located lies".split()
)


@dataclass(frozen=True)
class Answer:
    """What the model said about a picture.

    text: all of it, boxes as it wrote them
    boxes: xyxy in pixels of the picture, in the order of the text
    phrases: per box, the words it belongs to: those before it, else those of the box before, else what was asked for
    spans: per box, where it stands in `text`: start and end in characters
    unread: what has the form of a box and is none, each with the reason
    """

    text: str
    boxes: list[Box]
    phrases: list[str]
    spans: list[tuple[int, int]]
    unread: list[str]


class GroundingChat:
    """Questions about pictures, one by one, in batches, as a stream, or as a talk of several turns about one picture."""

    def __init__(self, model: GroundingModel):
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device_map: str | dict = "cpu",
        dtype: torch.dtype = torch.float32,
        bits: int | None = None,
    ) -> "GroundingChat":
        """A folder of `scripts/finetune_mllm.py`, or a stock LLaVA's folder or name on the model hub (`mllm.opening`).

        device_map: a device, `auto` (over all GPUs, the rest on the CPU), or a dictionary of modules, as in accelerate
        dtype: float32 keeps answers independent of the batch; bfloat16 is half the memory
        bits: 4 (NF4) or 8 keeps the language model's linear layers so, by bitsandbytes; the whole is never in memory
        """
        if bits not in (None, 4, 8):
            raise DataError(f"bits is {bits}; choose 4, 8 or None")
        return cls(GroundingModel(*load_mllm(folder, dtype, device_map=device_map, bits=bits)))

    def ask(
        self, image: Image.Image, question: str, regions: Sequence[Box | dict] = (), max_new_tokens: int = MAX_NEW_TOKENS
    ) -> Answer:
        """One answer.

        question: `<region>` (in order) or `<region:i>` names a box of `regions`
        regions: boxes, xyxy in pixels of the picture, or objects with `box`, `point` or `mask`, as in a record
        """
        return self.ask_many([image], [question], [regions], max_new_tokens=max_new_tokens)[0]

    def ask_many(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        regions: Sequence[Sequence[Box | dict]] | None = None,
        batch_size: int = 8,
        max_new_tokens: int = MAX_NEW_TOKENS,
        progress: bool = False,
    ) -> list[Answer]:
        """One answer per picture and question, in their order; the same picture object for several questions is run once."""
        counts = {"pictures": len(images), "questions": len(questions)} | ({} if regions is None else {"regions": len(regions)})
        if len(set(counts.values())) > 1 or batch_size < 1:
            seen = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise DataError(f"ask_many was given {seen}, batch_size {batch_size}; give as many of each, and batches of 1 or more")
        regions = [list(boxes) for boxes in regions] if regions is not None else None
        texts = self.model.generate(list(images), list(questions), regions, batch_size, max_new_tokens, progress)
        return [self.read(*item) for item in zip(texts, questions, images, strict=True)]

    def stream(
        self,
        image: Image.Image,
        question: str,
        regions: Sequence[Box | dict] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
    ) -> Iterator[str | Answer]:
        """The pieces of the answer's text as they come, and at last the `Answer`, whose text they add up to.

        Breaking off the iteration stops the model at once. temperature: 0 is greedy; above, tokens are drawn with the logits
        divided by it.
        """
        return self.talk(image).stream(question, regions, max_new_tokens, temperature)

    def talk(self, image: Image.Image) -> "Talk":
        """A conversation of several turns about one picture, which is read once."""
        return Talk(self, image)

    def read(self, text: str, question: str, image: Image.Image) -> Answer:
        """What was said to a question about a picture, or its beginning, as an `Answer`."""
        written, read, unread = self.model.codec.spans(text), [], []
        for (start, end), phrase in zip(written, phrases_of(text, written, question), strict=True):
            box, reason = self.model.decode_box(text[start:end], image.size)
            if box is None:
                unread.append(f"{text[start:end]}: {reason}")
            else:
                read.append((box, phrase, (start, end)))
        boxes, phrases, spans = map(list, zip(*read, strict=True)) if read else ([], [], [])
        return Answer(text, boxes, phrases, spans, unread)


def phrases_of(text: str, spans: Sequence[tuple[int, int]], question: str) -> list[str]:
    """The words that each box of an answer belongs to; `spans` is where the boxes stand in `text`."""
    asked = _ASKED.search(question)
    phrases, before = [], 0
    for start, end in spans:
        words = _BREAK.split(text[before:start])[-1].split()
        while words and words[0].lower() in _FILLERS:
            words.pop(0)
        while words and words[-1].lower() in _FILLERS:
            words.pop()
        phrases.append(" ".join(words) or (phrases[-1] if phrases else (asked[1] if asked else question.strip(" ?"))))
        before = end
    return phrases


def next_token(logits_V: torch.Tensor, temperature: float) -> int:
    """The likeliest token, or one drawn from softmax(logits / temperature)."""
    if temperature <= 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V.float() / temperature).softmax(-1), 1))


class Talk:
    """Several turns about one picture. What was read before, the picture first of all, is kept and not read again.

    chat, image: whose talk it is, and about which picture
    messages: the turns so far, {"role": user or assistant, "content": text with boxes as the model reads them}
    """

    def __init__(self, chat: GroundingChat, image: Image.Image):
        self.messages: list[dict[str, str]] = []
        self.chat, self.image, self._model = chat, image, chat.model
        self._asked: list[tuple[str, list]] = []  # questions and their regions
        self._read: list[int] = []  # tokens whose keys and values `_state` holds
        self._state = None

    def ask(self, question: str, regions: Sequence[Box | dict] = (), max_new_tokens: int = MAX_NEW_TOKENS) -> Answer:
        """The next turn; as `GroundingChat.ask`."""
        *_, answer = self.stream(question, regions, max_new_tokens)
        return answer

    def keep(self, turns: int) -> None:
        """Only the first `turns` stay in the talk; the picture is not read again for what comes next."""
        self.messages, self._asked = self.messages[: 2 * turns], self._asked[:turns]

    def forget(self) -> None:
        """Frees what was read; the turns stay, and the next one reads them and the picture again."""
        self._read, self._state = [], None

    @torch.inference_mode()
    def stream(
        self,
        question: str,
        regions: Sequence[Box | dict] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
    ) -> Iterator[str | Answer]:
        """The next turn; as `GroundingChat.stream`. An answer that is broken off stays in the talk as far as it came."""
        model, tokenizer = self._model, self._model.tokenizer
        content = model.question_text(self.image, question, list(regions))
        messages = [*self.messages, {"role": "user", "content": content if self.messages else f"{IMAGE}\n{content}"}]
        ids = self._prompt_ids(messages, max_new_tokens)
        self._asked.append((question, list(regions)))
        new, said, text = [], "", ""
        try:
            for token in self._decode(ids, max_new_tokens, temperature):
                new.append(token)
                text = tokenizer.decode(new, skip_special_tokens=True).strip()
                if text.startswith(said) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a letter
                    piece, said = text[len(said) :], text
                    if piece:
                        yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": text}]
        if text != said:
            yield text[len(said) :]
        yield self.chat.read(text, question, self.image)

    def _prompt_ids(self, messages: list[dict[str, str]], max_new_tokens: int) -> list[int]:
        """Tokens of the whole talk up to the answer, the picture's mark widened."""
        model = self._model
        ids = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        mark, num_marks = ids.index(model.image_token_id), model.num_image_tokens(self.image)
        ids[mark : mark + 1] = [model.image_token_id] * num_marks
        limit = getattr(model.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise DataError(
                f"the talk has {len(ids)} tokens and the answer may take {max_new_tokens}, the language model reads {limit}; "
                "begin a new talk, or lower max_new_tokens"
            )
        return ids

    def _decode(self, ids: list[int], max_new_tokens: int, temperature: float) -> Iterator[int]:
        """Tokens after `ids`. Of these only what follows the part read before is run."""
        model, device = self._model.model, self._model.model.device
        shared = min(len(commonprefix([ids, self._read])), len(ids) - 1)  # the last one is run, for what comes next
        picture_end = len(ids) - ids[::-1].index(self._model.image_token_id)
        if shared < picture_end or not attends_to_all(model.config.text_config, len(ids) + max_new_tokens):
            shared = 0  # a window has forgotten the tokens that stand before it
        elif shared < len(self._read):
            self._state.crop(shared - len(self._read))  # a negative number is how many to forget
        read, feed = ids[:shared], ids[shared:]
        more = self._region_features(feed)
        if not shared:
            self._state = new_state(model)
            more |= self._model.picture_inputs([self.image])
        for _ in range(max_new_tokens):
            self._read = []  # and so it stays if the run is broken off half way
            fed = torch.tensor([feed], device=device)
            out, more = model(input_ids=fed, **{CACHE: self._state}, use_cache=True, logits_to_keep=1, **more), {}
            self._read = read = read + feed
            token = next_token(out.logits[0, -1], temperature)
            if token in self._model.end_ids:
                return
            yield token
            feed = [token]

    def _region_features(self, feed: list[int]) -> dict[str, torch.Tensor]:
        """Features of the region marks among the last tokens of the talk, for a model that has region tokens."""
        model = self._model
        num_marks = feed.count(model.model.config.region_token_id) if model.region_token else 0
        if not num_marks:
            return {}
        questions, regions = zip(*self._asked, strict=True)
        found = model.region_features(list(questions), [self.image] * len(questions), list(regions))
        return {name: value[-num_marks:] for name, value in found.items()}
