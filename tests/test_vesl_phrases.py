"""Phrases of captions: the paper's listing on tagged words, its two word lists, and the taggers that are installed."""

import pickle

import pytest

from encoder.errors import DataError
from encoder.vesl import phrases as module
from encoder.vesl.phrases import GENERIC_WORDS, NLTK_DATA, STOP_WORDS, Phrases, noun_phrases, word_runs

nltk = pytest.importorskip("nltk", reason="nltk is not installed (extra vesl)")
pytest.importorskip("spacy", reason="spacy is not installed (extra vesl)")


def has_nltk_data() -> bool:
    try:
        nltk.pos_tag(nltk.word_tokenize("a dog"))
    except LookupError:
        return False
    return True


CAPTION = "A photo of two red apples, a bus and an umbrella. The bus is left of a large white dog."


def test_the_word_lists_are_the_papers():
    assert len(STOP_WORDS) == 127 and len(GENERIC_WORDS) == 61
    assert not STOP_WORDS & GENERIC_WORDS
    assert not {"ll", "ve", "re", "d"} & STOP_WORDS  # parts of contractions came into NLTK's list later


# Tags as nltk's own tagger writes them; the phrases follow from the grammar <DT>?<JJ.*>*<NN.*>+ by hand.
TAGGED = [
    ("a/DT dog/NN runs/VBZ", [["a", "dog"]]),
    ("the/DT biggest/JJS red/JJ fire/NN truck/NN", [["the", "biggest", "red", "fire", "truck"]]),
    ("two/CD red/JJ apples/NNS on/IN it/PRP", [["red", "apples"]]),  # the grammar knows no numbers
    ("the/DT man/NN 's/POS dog/NN", [["the", "man"], ["dog"]]),
    ("new/NNP york/NNP city/NN skyline/NN", [["new", "york", "city", "skyline"]]),
    ("the/DT old/JJ", []),
    ("the/DT a/DT cat/NN", [["a", "cat"]]),
    ("", []),
]


@pytest.mark.parametrize("tagged, expected", TAGGED)
def test_the_chunk_grammar(tagged, expected):
    assert noun_phrases([tuple(word.rsplit("/", 1)) for word in tagged.split()]) == expected


class TestListing:
    """The listing around the tagger, with the tags given."""

    @pytest.fixture()
    def tagged(self, monkeypatch):
        """Words between spaces, every one a noun but for a few; what the tagger was given is kept."""
        seen = []
        tags = {"a": "DT", "the": "DT", "of": "IN", "and": "CC", "red": "JJ"}

        def tag(self, words):
            seen.append(words)
            return [(word, tags.get(word, "NN")) for word in words]

        monkeypatch.setattr(Phrases, "_words", lambda self, caption: caption.split())
        monkeypatch.setattr(Phrases, "_tags", tag)
        return seen

    def test_generic_words_go_before_tagging_and_letters_are_small(self, tagged):
        assert Phrases().extract("A Photo of a Red BUS and free wallpaper") == ["a red bus"]
        assert tagged == [["a", "of", "a", "red", "bus", "and"]]

    def test_phrases_of_stop_words_alone_go(self, tagged):
        assert Phrases().extract("the other of the other bus of who") == ["the other bus"]

    def test_the_first_twenty_are_kept_repeats_and_all(self, tagged):
        caption = " and ".join(f"a n{i % 15}" for i in range(30))
        found = Phrases().extract(caption)
        assert found == [f"a n{i % 15}" for i in range(20)]
        assert Phrases(deduplicate=True).extract(caption) == [f"a n{i}" for i in range(15)]
        assert Phrases(max_phrases=3).extract(caption) == ["a n0", "a n1", "a n2"]

    def test_no_caption_no_phrase(self, tagged):
        assert Phrases().extract("") == Phrases().extract("a the of") == []


def test_word_runs_are_nltks_everygrams():
    words = "the red bus stops near a very old town hall , again and again today".split()
    ours = [tuple(run) for run in word_runs(words, 10)]
    assert ours == [run for run in nltk.everygrams(words, max_len=10) if run != (",",)]
    assert max(map(len, ours)) == 10


def test_ngrams_as_owlv2_labels_alt_text():
    assert Phrases(rule="ngrams").extract("The bus in a JPG, red") == [
        *("the bus", "the bus in", "the bus in a", "the bus in a ,", "the bus in a , red", "bus", "bus in", "bus in a"),
        *("bus in a ,", "bus in a , red", "in a ,", "in a , red", "a ,", "a , red", ", red", "red"),
    ]
    long = " ".join(f"n{i}" for i in range(100))
    assert len(Phrases(rule="ngrams").extract(long)) == 300 and len(Phrases(rule="ngrams", max_phrases=7).extract(long)) == 7


def test_the_default_works_with_what_the_extra_installs():
    assert Phrases().extract(CAPTION) == ["red apples", "a bus", "an umbrella", "the bus", "a large white dog"]
    assert Phrases(deduplicate=True, max_phrases=2).extract(CAPTION) == ["red apples", "a bus"]
    described = Phrases().describe()
    assert described["rule"] == "nltk" and described["max_phrases"] == 20
    assert set(described["tools"]) == {"nltk", "spacy", "spacy_model"} and "3.8" in described["tools"]["spacy_model"]
    assert pickle.loads(pickle.dumps(Phrases())).extract("a red bus") == ["a red bus"]  # as it travels to a worker


def test_noun_chunks_by_spacy():
    found = Phrases(rule="spacy").extract(CAPTION)
    assert found == ["two red apples", "a bus", "an umbrella", "the bus", "a large white dog"]  # numbers, unlike the grammar
    assert Phrases(rule="spacy").extract("it shows a free photo of them and a cat") == ["a cat"]


@pytest.mark.skipif(not has_nltk_data(), reason=f"nltk's data ({', '.join(NLTK_DATA)}) is not on this machine")
def test_nltks_own_tagger():
    assert Phrases(tagger="nltk").extract(CAPTION) == ["red apples", "a bus", "an umbrella", "the bus", "a large white dog"]


@pytest.mark.skipif(has_nltk_data(), reason="nltk's data is on this machine")
def test_missing_nltk_data_is_one_sentence_with_the_command():
    with pytest.raises(DataError, match="run `python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng`, or use spaCy"):
        Phrases(tagger="nltk").extract("a dog")


def test_bad_fields_and_models_are_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(DataError, match="rule is 'nouns'; choose one of nltk, spacy, ngrams"):
        Phrases(rule="nouns")
    with pytest.raises(DataError, match="tagger is 'treetagger'; choose one of spacy, nltk"):
        Phrases(tagger="treetagger")
    with pytest.raises(DataError, match="max_phrases is 0; give at least 1"):
        Phrases(max_phrases=0)
    with pytest.raises(DataError, match="name an installed model or its folder"):
        Phrases(spacy_model=str(tmp_path)).extract("a dog")
    monkeypatch.setattr(module, "SPACY_MODEL", "no_such_model")
    monkeypatch.setattr(module, "SPACY_MODEL_PACKAGE", "no_such_package")
    module._spacy.cache_clear()
    try:
        with pytest.raises(DataError, match="no_such_model is not installed; pip install"):
            Phrases().extract("a dog")
    finally:
        module._spacy.cache_clear()
