"""The model for lmms-eval, driven as its evaluator drives one: found by entry point, made from an argument string, asked by
requests of its form.

Where lmms-eval is not installed its base class, request and manifest stand in, with the same fields.
"""

import importlib
import importlib.util
import sys
import tomllib
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from encoder.data.pictures import load_library
from encoder.data.scenes import PictureLibrary, SceneConfig, draw_scene
from encoder.errors import DataError
from mllm import GroundingChat

ROOT = Path(__file__).parents[1]
MLLM = ROOT / "weights" / "mllm_cloc"


class StandInBase:
    """lmms_eval.api.model.lmms: what its evaluator sets and calls."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda attribute, request, result: None)

    @property
    def rank(self):
        return self._rank

    @classmethod
    def create_from_arg_string(cls, arguments: str, additional: dict):
        given = dict(part.split("=", 1) for part in arguments.split(",") if part)
        return cls(**given, **{key: value for key, value in additional.items() if value is not None})


@dataclass
class StandInInstance:
    """lmms_eval.api.instance.Instance."""

    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)

    @property
    def args(self):
        return self.arguments


@dataclass
class StandInResult:
    """lmms_eval.api.instance.GenerationResult."""

    text: object
    token_counts: object = None


@dataclass(frozen=True)
class StandInManifest:
    """lmms_eval.models.registry_v2.ModelManifest."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture
def package(monkeypatch):
    """(base class, request class), of lmms-eval itself where it is installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.instance", "lmms_eval.models")
        for name in (*names, "lmms_eval.models.registry_v2"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = StandInBase
        sys.modules["lmms_eval.api.instance"].Instance = StandInInstance
        sys.modules["lmms_eval.api.instance"].GenerationResult = StandInResult
        sys.modules["lmms_eval.models.registry_v2"].ModelManifest = StandInManifest
    yield importlib.import_module("lmms_eval.api.model").lmms, importlib.import_module("lmms_eval.api.instance").Instance
    sys.modules.pop("mllm.lmms_eval_model", None)


@pytest.fixture
def model(package):
    """The model as its registry finds it: entry point, manifest, class path."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, _, name = entry["open_cloc"].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "open_cloc" and manifest.chat_class_path is None
    module, _, name = manifest.simple_class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert issubclass(cls, package[0]) and cls.is_simple and not getattr(cls, "__abstractmethods__", None)
    arguments = {"batch_size": 4, "max_batch_size": None, "device": "cpu"}
    return cls.create_from_arg_string(f"pretrained={MLLM}", arguments)


@pytest.fixture(scope="module")
def docs():
    """Documents of a task: a picture and a question each."""
    library = PictureLibrary(load_library("base", seed=0)[0])
    scenes = [draw_scene(SceneConfig(), library, seed=6, index=index, split="lmms") for index in range(5)]
    return [{"image": scene.image, "question": f"Where is {scene.expressions[0][1]}?"} for scene in scenes]


GENERATION = {"max_new_tokens": 24, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


def request(package, kind: str, docs, doc_id: int, second, context: str | None = None):
    visual = lambda doc: [doc["image"]]  # noqa: E731
    arguments = (context or docs[doc_id]["question"], second, visual, doc_id, "mme", "test")
    return package[1](kind, arguments, 0, {"task": "mme", "doc_id": doc_id, "repeats": 1})


def test_answers_are_the_chats_cut_at_a_tasks_stops(package, model, docs):
    model.task_dict = {"mme": {"test": docs}}
    chat = GroundingChat.from_pretrained(MLLM)
    expected = [chat.ask(doc["image"], doc["question"], max_new_tokens=24).text for doc in docs]
    requests = [request(package, "generate_until", docs, i, dict(GENERATION)) for i in range(5)]
    # A shorter answer, a mark of the picture in the context, and a stop.
    requests.append(request(package, "generate_until", docs, 1, GENERATION | {"max_new_tokens": 3}))
    requests.append(request(package, "generate_until", docs, 2, dict(GENERATION), "<image>\n" + docs[2]["question"]))
    requests.append(request(package, "generate_until", docs, 3, GENERATION | {"until": ["\n\n", ", "]}))
    got = model.generate_until(requests)
    assert got[:5] == expected and got[6] == expected[2]
    assert expected[1].startswith(got[5]) and len(got[5]) < len(expected[1])
    assert got[7] == expected[3].split(", ")[0] != expected[3]


def test_multiple_choice_takes_the_smallest(package, model, docs):
    """The task's argmin is the answer that greedy decoding gives, and only that one is called greedy."""
    model.task_dict = {"mme": {"test": docs}}
    said = model.generate_until([request(package, "generate_until", docs, i, dict(GENERATION)) for i in range(5)])
    choices = ["a bus", "[000, 000, 999, 999]"]
    requests = [request(package, "loglikelihood", docs, i, f" {choice}") for i in range(5) for choice in (said[i], *choices)]
    scores = [result.text for result in model.loglikelihood(requests)]
    for i in range(5):
        losses = [loss for loss, _ in scores[3 * i : 3 * i + 3]]
        assert min(losses) == losses[0] > 0
        assert [greedy for _, greedy in scores[3 * i : 3 * i + 3]] == [True, False, False]
    by_document = request(package, "loglikelihood", docs, 0, lambda doc: said[0])
    assert model.loglikelihood([by_document])[0].text[0] == pytest.approx(scores[0][0], rel=1e-4)


def test_what_it_cannot_do_says_so(package, model, docs):
    model.task_dict = {"mme": {"test": docs}}
    beams = request(package, "generate_until", docs, 0, GENERATION | {"num_beams": 3})
    with pytest.raises(DataError, match="task mme asks for sampling or beams"):
        model.generate_until([beams])
    two = request(package, "generate_until", docs, 0, dict(GENERATION))
    arguments = (*two.arguments[:2], lambda doc: [doc["image"]] * 2, *two.arguments[3:])
    with pytest.raises(DataError, match="task mme, document 0: 2 visuals; this model answers about one picture"):
        model.generate_until([package[1]("generate_until", arguments, 0, two.metadata)])
    with pytest.raises(DataError, match="model_args has precision; known are pretrained, device, dtype"):
        type(model)(str(MLLM), precision="half")
    assert model.device == torch.device("cpu")
