import pytest
import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from PIL import Image
from transformers import MistralConfig, MistralForCausalLM

from encoder.errors import DataError
from mllm.checkpoint import save_mllm
from mllm.config import MllmConfig
from mllm.generation import GroundingModel
from mllm.model import build_mllm, join


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """An MLLM with random weights and seven questions of many lengths on three pictures."""
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 3)
    write_clip(folder / "clip")
    mllm = build_mllm(MllmConfig(**recipe(folder)))
    for name, parameter in mllm.model.named_parameters():
        if "language_model.layers" in name and parameter.ndim > 1:
            parameter.data *= 8  # answers then depend on question and picture
    save_mllm(folder / "mllm", mllm.model, mllm.tokenizer, mllm.settings, torch.float32, None, mllm.sentencepiece_model)
    pictures = [Image.open(path).convert("RGB") for path in sorted((folder / "images").glob("*.png"))]
    questions = [
        "Where is the red square?",
        "What is <region>?",
        "Where is the blue square on the left of the green square?",
        "What is <region:0>?",
        "Where?",
        "Is <region> in <region>?",
        "What is a square?",
    ]
    regions = [[], [(1, 2, 20, 30)], [], [(5, 5, 30, 30)], [], [(1, 1, 9, 9), (0, 0, 40, 40)], []]
    images = [pictures[index % 3] for index in range(len(questions))]
    return GroundingModel.from_pretrained(folder / "mllm"), images, questions, regions


def test_answers_do_not_depend_on_the_batch(asked):
    model, images, questions, regions = asked
    alone = model.generate(images, questions, regions, batch_size=1, max_new_tokens=12, progress=False)
    assert len(set(alone)) > 1 and all(alone)
    for size in (2, 3, 64):
        assert model.generate(images, questions, regions, batch_size=size, max_new_tokens=12, progress=False) == alone
    backwards = model.generate(images[::-1], questions[::-1], regions[::-1], max_new_tokens=12, progress=False)
    assert backwards[::-1] == alone


def test_answers_are_stock_llavas_greedy_ones(asked):
    """Marks widened by hand, no cache, one argmax at a time through the stock forward."""
    model, images, questions, regions = asked
    got = model.generate(images, questions, regions, max_new_tokens=8, progress=False)
    for index in (0, 1, 2):
        prefix, question = model._prompt_ids(images[index], questions[index], regions[index])
        prompt = [*prefix, *question]
        ids = [i for token in prompt for i in ([token] * 25 if token == model.image_token_id else [token])]
        pixels, new = model.settings.image.pixels([images[index]]), []
        with torch.no_grad():
            while len(new) < 8 and (not new or new[-1] != model.tokenizer.eos_token_id):
                logits = model.model(input_ids=torch.tensor([ids + new]), pixel_values=pixels).logits
                new.append(int(logits[0, -1].argmax()))
        assert got[index] == model.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_picture_and_its_prefix_are_run_once_in_a_batch(asked, monkeypatch):
    model, images, questions, regions = asked
    seen = []
    real = model.model.model.forward

    def counted(*args, pixel_values=None, **kwargs):
        seen.append(0 if pixel_values is None else len(pixel_values))
        return real(*args, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(model.model.model, "forward", counted)
    model.generate(images, questions, regions, max_new_tokens=2, progress=False)
    assert sum(seen) == 3


def test_the_prefix_state_has_room_and_is_not_copied_for_every_token(asked):
    """The rows hold the keys of their pictures' prefixes, and what comes later is written behind them in place."""
    model, images, questions, _ = asked
    prefix = [*model._prompt_ids(images[0], questions[0], [])[0][:-1], *[model.image_token_id] * 25]
    with torch.inference_mode():
        whole = model._prefix_state(prefix, images[:4], 3)
        alone = model.model.model(
            input_ids=torch.tensor([prefix]), pixel_values=model.settings.image.pixels([images[3]]), use_cache=True
        ).past_key_values
        layer, before = whole.layers[0], whole.layers[0].keys.clone()
        assert torch.equal(layer.keys[3], layer.keys[0]) and torch.allclose(layer.keys[3:], alone.layers[0].keys, atol=1e-6)
        assert whole.get_seq_length() == len(prefix)
        place, new = layer.keys.data_ptr(), torch.ones_like(layer.keys[:, :, :1])
        for length in (1, 2, 3):
            keys, values = whole.update(new * length, -new * length, 0)
            assert keys.data_ptr() == place and keys.shape[2] == values.shape[2] == len(prefix) + length
        assert torch.equal(keys[:, :, : len(prefix)], before) and keys[0, 0, len(prefix) :, 0].tolist() == [1, 2, 3]
        assert values[0, 0, len(prefix) :, 0].tolist() == [-1, -2, -3]


def test_a_language_models_own_generation_settings_do_not_count(asked):
    model, images, questions, regions = asked
    plain = model.generate(images, questions, regions, max_new_tokens=12, progress=False)
    settings = model.model.generation_config
    settings.repetition_penalty, settings.no_repeat_ngram_size = 1.7, 2
    try:
        assert model.generate(images, questions, regions, max_new_tokens=12, progress=False) == plain
    finally:
        settings.repetition_penalty, settings.no_repeat_ngram_size = 1.0, 0


@pytest.mark.parametrize("window", [8, 30, 200])
def test_a_sliding_window_gives_the_answers_of_questions_asked_alone(asked, window):
    """A Mistral in the Llama's place: shorter than the picture, than picture and question, and longer than all."""
    model, images, questions, regions = asked
    llama = model.model.config.text_config
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = MistralConfig(**{key: getattr(llama, key) for key in fields}, num_key_value_heads=2, sliding_window=window)
    torch.manual_seed(3)
    llm = MistralForCausalLM(config)
    for parameter in llm.model.layers.parameters():
        if parameter.ndim > 1:
            parameter.data *= 8
    joined = join(model.model.model.vision_tower, llm, model.tokenizer, -2)
    mistral = GroundingModel(joined, model.tokenizer, model.settings)
    got = mistral.generate(images, questions, regions, max_new_tokens=6, progress=False)
    for index, answer in enumerate(got):
        prefix, question = mistral._prompt_ids(images[index], questions[index], regions[index])
        ids = [i for token in [*prefix, *question] for i in ([token] * 25 if token == mistral.image_token_id else [token])]
        pixels, new = mistral.settings.image.pixels([images[index]]), []
        with torch.no_grad():
            while len(new) < 6 and (not new or new[-1] != mistral.tokenizer.eos_token_id):
                new.append(int(joined(input_ids=torch.tensor([ids + new]), pixel_values=pixels).logits[0, -1].argmax()))
        assert answer == mistral.tokenizer.decode(new, skip_special_tokens=True).strip(), index


def test_boxes_come_back_in_pixels_of_the_picture(asked):
    model = asked[0]
    box, reason = model.decode_box("[250, 375, 750, 625]", (80, 40))  # padded: the picture is the middle half
    assert reason is None
    assert box == pytest.approx((20.04, 10.04, 60.04, 30.04), abs=0.01)
    assert model.decode_box("red square", (80, 40)) == (None, "no box of the form [000, 000, 999, 999]")
    assert model.decode_box("[100, 000, 300, 100]", (80, 40)) == (None, "the box lies in the padding, outside the picture")


def test_a_question_without_its_box_is_refused(asked):
    model, images, _, _ = asked
    with pytest.raises(DataError, match="<region:0>, but 0 boxes"):
        model.generate(images[:1], ["What is <region>?"], [[]], progress=False)
    with pytest.raises(DataError, match="holds the mark <image>"):
        model.generate(images[:1], ["What is <image>?"], progress=False)
    assert model.generate([], [], [], progress=False) == []


def test_a_question_that_is_too_long_is_refused(asked):
    model, images, _, _ = asked
    limit = model.model.config.text_config.max_position_embeddings
    with pytest.raises(DataError, match=f"question 'Where .* tokens with its picture, the language model reads {limit}; cut it"):
        model.generate(images[:1], ["Where is the square? " * limit], progress=False)
