"""The models behind the chat: one or two MLLMs and an encoder, loaded together, each with its error where it has one."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from demo.board import NO_PICTURE
from encoder.errors import DataError
from encoder.predictor import RegionPredictor
from mllm.chat import Answer, GroundingChat, Talk
from mllm.opening import local_folder, read_mllm

if TYPE_CHECKING:
    from demo.session import Session, Turn

KEPT_TALKS = 8  # whose pictures and words are kept read; the others are read again when they go on
MAX_ANSWER, MAX_TEMPERATURE = 1024, 10  # tokens, and how far from the likeliest word
GIB = 2**30
MAX_LABELS, MAX_LABEL = 100, 100  # labels, and characters of each
LONG_MEMORY = 2048  # tokens; a language model that reads fewer is given each question without the turns before it


@dataclass(frozen=True)
class Settings:
    """How a question is asked. temperature: 0 is greedy; max_new_tokens: of the answer; history: earlier turns are given."""

    temperature: float = 0.0
    max_new_tokens: int = 128
    history: bool = False

    def __post_init__(self):
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise DataError(f"The temperature is {self.temperature}; give 0 to {MAX_TEMPERATURE}.")
        if not 1 <= self.max_new_tokens <= MAX_ANSWER:
            raise DataError(f"The longest answer is {self.max_new_tokens} tokens; give 1 to {MAX_ANSWER}.")


@dataclass
class Speaker:
    """An MLLM by name. chat: None where it could not be loaded, for the reason in `error`."""

    name: str
    folder: Path
    chat: GroundingChat | None = None
    error: str = ""


class OncePerPicture:
    """Stands before a tower's forward pass: the pixels that it was last given are not run again, whoever gives them."""

    def __init__(self, tower: torch.nn.Module, kept: int = 2):
        self._forward, self._limit, self._outputs = tower.forward, kept, OrderedDict()
        tower.forward = self

    def __call__(self, pixel_values: torch.Tensor, **options):
        pixels = pixel_values.detach().contiguous().cpu().view(torch.uint8).numpy()
        key = hashlib.sha256(f"{tuple(pixel_values.shape)}".encode() + pixels.tobytes()).digest()
        if key not in self._outputs:
            options |= {"output_hidden_states": True, "return_dict": True}  # what either asks for
            self._outputs[key] = self._forward(pixel_values, **options)
        self._outputs.move_to_end(key)
        while len(self._outputs) > self._limit:
            self._outputs.popitem(last=False)
        return type(self._outputs[key])(**self._outputs[key])  # Llava writes into what it gets


class Models:
    """The MLLMs that answer, and the encoder alone.

    folders: of MLLMs, or their names on the model hub; answers come in their order; encoder: a CLOC folder
    device, bits: as of `GroundingChat.from_pretrained`; dtype: as of `load_chat`
    """

    def __init__(
        self,
        folders: Sequence[Path],
        encoder: Path,
        device: str = "cpu",
        bits: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        names = [Path(folder).resolve().name for folder in folders]
        unique = len(set(names)) == len(names)
        self.speakers = [
            Speaker(name if unique else str(folder), Path(folder)) for name, folder in zip(names, folders, strict=True)
        ]
        self.encoder, self.encoder_error, self.predictor, self.dtype = Path(encoder), "", None, dtype
        # Of each visitor who is there, by model: the talk and the turns that it was given. Here, so that no visitor keeps a model
        # in memory after `load`.
        self._talks: WeakKeyDictionary[Session, dict[str, tuple[Talk, list[Turn]]]] = WeakKeyDictionary()
        self._recent: OrderedDict[int, Talk] = OrderedDict()
        self.load(device, bits)

    def load(self, device: str, bits: int | None) -> None:
        """Loads all of them; one that fails has its reason in one sentence, and the others work."""
        self.device, self.bits, self._picture, self.predictor = device, bits, None, None
        self._talks.clear()
        self._recent.clear()
        for speaker in self.speakers:
            speaker.chat, speaker.error = None, ""
            try:
                speaker.chat = load_chat(speaker.folder, device, bits, self.dtype)
                OncePerPicture(speaker.chat.model.model.model.vision_tower)
            except Exception as error:  # whatever a folder of any origin raises; the page shows it
                speaker.error = f"The model {speaker.name} cannot be used: {one_line(error)}"
        try:
            self.encoder_error, self.predictor = "", self._load_encoder()
        except Exception as error:
            self.encoder_error = f"The encoder cannot be used: {one_line(error)}"

    def _load_encoder(self) -> RegionPredictor:
        """The encoder, on the tower of the first MLLM that has the same weights, so that a picture is run once for both."""
        if not self.encoder.is_dir():
            raise DataError(f"there is no folder {self.encoder}; name a CLOC folder with --encoder")
        predictor = RegionPredictor.from_pretrained(self.encoder)
        own = predictor.model.vision_model.state_dict()
        for speaker in self.speakers:
            if speaker.chat is None:
                continue
            tower = speaker.chat.model.model.model.vision_tower
            theirs = tower.state_dict()
            if own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name].to(own[name])) for name in own):
                predictor.model.to(tower.device, tower.dtype)
                predictor.model.vision_model = tower
                break
        else:
            OncePerPicture(predictor.model.vision_model)
        return predictor

    @property
    def ready(self) -> list[Speaker]:
        """Those that can be asked; DataError where there is none."""
        speakers = [speaker for speaker in self.speakers if speaker.chat is not None]
        if not speakers:
            raise DataError(self.speakers[0].error)
        return speakers

    @property
    def errors(self) -> list[str]:
        return [speaker.error for speaker in self.speakers if speaker.error]

    @property
    def reserved(self) -> list[str]:
        """Marks of the models' own, which no question may hold."""
        return sorted({token for speaker in self.ready for token in speaker.chat.model.tokenizer.all_special_tokens})

    @property
    def long_memory(self) -> bool:
        """Whether the language models read enough to be given earlier turns."""
        configs = [speaker.chat.model.model.config.text_config for speaker in self.speakers if speaker.chat is not None]
        return bool(configs) and all(getattr(config, "max_position_embeddings", 0) >= LONG_MEMORY for config in configs)

    def stream(self, session: "Session", speaker: Speaker, turn: "Turn", text: str, settings: Settings) -> Iterator[str | Answer]:
        """What a model says to a turn of the session; `text` is its question with marks as regions.

        Earlier turns are left out where they are not wanted, were taken back, or no longer fit.
        """
        talk, given = self._talk(session, speaker)
        there = [session.holds(old) for old in given]
        kept = there.index(False) if False in there else len(given)
        given[kept if settings.history else 0 :] = []
        talk.keep(len(given))
        outlined = speaker.chat.model.settings.regions == "pooling"
        regions = [session.board.region(number, outlined) for number in turn.numbers]
        asked = (text, regions, settings.max_new_tokens, settings.temperature)
        given.append(turn)
        try:
            yield from talk.stream(*asked)
        except DataError:
            if len(given) == 1:
                raise
            del given[:-1]
            talk.keep(0)
            yield from talk.stream(*asked)

    def _talk(self, session: "Session", speaker: Speaker) -> "tuple[Talk, list[Turn]]":
        """A visitor's talk with a model about the picture on the board, and the turns that it was given."""
        talks = self._talks.setdefault(session, {})
        talk, given = talks.get(speaker.name, (None, []))
        if talk is None or talk.image is not session.board.picture:
            talk, given = talks[speaker.name] = speaker.chat.talk(session.board.picture), []
        self._recent[id(talk)] = talk
        self._recent.move_to_end(id(talk))
        while len(self._recent) > KEPT_TALKS:
            self._recent.popitem(last=False)[1].forget()
        return talk, given

    def _set(self, picture: Image.Image | None) -> RegionPredictor:
        if self.predictor is None:
            raise DataError(self.encoder_error)
        if picture is None:
            raise DataError(NO_PICTURE)
        if self._picture is not picture:
            self.predictor.set_image(picture)
            self._picture = picture
        return self.predictor

    @torch.no_grad()
    def rank(self, picture: Image.Image | None, boxes: Sequence, labels: Sequence[str]) -> list[list[tuple[str, float, float]]]:
        """For each box (xyxy, pixels) the labels, best first, each with its cosine and its share of the softmax over them."""
        labels = checked_labels(labels)
        if not len(boxes):
            raise DataError("There is no mark to name; draw a box on the picture first.")
        predictor = self._set(picture)
        _, cosines_RK = predictor.classify_boxes(boxes, labels)
        shares_RK = (cosines_RK * predictor.model.logit_scale.exp().float()).softmax(-1)
        order_RK = cosines_RK.argsort(dim=1, descending=True)
        return [
            [(labels[k], float(cosines_RK[row, k]), float(shares_RK[row, k])) for k in order.tolist()]
            for row, order in enumerate(order_RK)
        ]

    def find(self, picture: Image.Image | None, phrases: Sequence[str]) -> list[tuple[tuple[float, ...], float]]:
        """For each phrase its box, xyxy in pixels, and the cosine of the phrase with what lies there."""
        boxes_T4, scores_T = self._set(picture).ground(checked_labels(phrases))
        return [(tuple(box), score) for box, score in zip(boxes_T4.tolist(), scores_T.tolist(), strict=True)]


def load_chat(folder: Path, device: str, bits: int | None, dtype: torch.dtype | None = None) -> GroundingChat:
    """An MLLM's folder, or its name on the model hub, on a device.

    dtype: none is bfloat16, but float32 on the processor where its weights take at most half of the memory in it
    """
    folder = local_folder(folder)
    if not folder.is_dir():
        makers = "`make quickstart` (runs/quickstart/mllm_cloc) or `make reproduce` (runs/base/mllm_cloc)"
        raise DataError(f"there is no MLLM in {folder}; make one with {makers} and name its folder with --model")
    if device != "cpu":
        return GroundingChat.from_pretrained(folder, device, dtype or torch.bfloat16, bits)
    parameters, memory = count_parameters(folder), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    dtype = dtype or (torch.float32 if parameters * torch.float32.itemsize <= memory / 2 else torch.bfloat16)
    if not bits and (needed := parameters * dtype.itemsize) > memory:
        raise DataError(
            f"its weights take {needed / GIB:.1f} GiB and this machine has {memory / GIB:.1f}; take 4 or 8 bits (--bits)"
        )
    return GroundingChat.from_pretrained(folder, device, dtype, bits)


def count_parameters(folder: Path) -> float:
    """Of an MLLM's folder and what it is an adapter on, by the size of its files."""
    settings = read_mllm(folder)[1]
    folders = [folder, *(Path(settings.base[part]) for part in ("model", "llm", "tower") if settings.base.get(part))]
    size = sum(path.stat().st_size for each in folders for path in each.glob("*.safetensors"))
    return size / getattr(torch, settings.dtype).itemsize


def devices() -> list[str]:
    """What a model can be put on here."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    apple = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *gpus, *apple, *(["auto"] if len(gpus) > 1 else [])]


def told_of_devices() -> str:
    """A sentence on what `devices` lacks."""
    if torch.cuda.is_available():
        return f"torch sees {torch.cuda.device_count()} of this machine's GPUs."
    return "torch sees no GPU here, so the processor is all there is."


def checked_labels(labels: Sequence[str]) -> list[str]:
    """Labels without spaces around them and without repetition; DataError for none, too many or too long ones."""
    kept = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
    if not kept:
        raise DataError("There is no label; write one a line, or several with commas between them.")
    if len(kept) > MAX_LABELS or max(map(len, kept)) > MAX_LABEL:
        raise DataError(f"There are {len(kept)} labels; give at most {MAX_LABELS}, each of at most {MAX_LABEL} characters.")
    return kept


def one_line(error: Exception) -> str:
    """What an exception says, in one line; its kind, where it says nothing."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 400 else f"{words[:397]}..."
