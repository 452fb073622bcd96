"""Things that captions name and the detector does not find: CHAIR (arXiv 1809.02156) with detections in place of annotations.

For a record let O be the things its captions name and D those that its regions are named after. Over all records

    chair_i = sum |O - D| / sum |O|                              share of the named things that were not found
    chair_s = captions with a thing of O - D / captions          share of captions that name at least one such thing
    sentence = sentences with a thing of O - D / sentences        the same for each sentence of a caption

A thing that is there and was not found counts as made up, so that the values say how captions compare under one detector and
threshold, not how often a captioner is wrong; the paper's Table 2 is measured on COCO's annotations. What was never asked
for, because a caption named more things than the phrases allowed, is in neither O nor the score.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from encoder.errors import DataError

SENTENCES = re.compile(r"(?<=[.!?])\s+")


def read_objects(path: str | Path) -> dict[str, str]:
    """A text file of things, one a line, synonyms after it between commas ("dog, puppy") -> word -> its thing."""
    names: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        words = [word.strip().lower() for word in line.split(",") if word.strip()]
        for word in words:
            if names.setdefault(word, words[0]) != words[0]:
                raise DataError(f"{path}, line {number}: '{word}' is a {names[word]} and a {words[0]}; leave it at one of them")
    if not names:
        raise DataError(f"{path} names nothing; write a thing a line, its synonyms after commas")
    return names


def head(phrase: str) -> str:
    """What a phrase is about: its last word, singular. "two red apples" -> "apple"."""
    word = (re.findall(r"\w+", phrase.lower()) or [""])[-1]
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word


def named(text: str, names: Mapping[str, str]) -> set[str]:
    """The things that a text names as whole words, also in the plural. Of names within one another the longer counts: a "hot
    dog" is no "dog"."""
    text, found = text.lower(), set()
    for name in sorted(names, key=lambda name: (-len(name), name)):
        plural = rf"(?:{re.escape(name)}(?:s|es)?" + (rf"|{re.escape(name[:-1])}ies)" if name.endswith("y") else ")")
        text, count = re.subn(rf"(?<!\w){plural}(?!\w)", "/", text)
        found |= {names[name]} if count else set()
    return found


def hallucination(records: Iterable[Mapping[str, Any]], names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The three shares over records with captions, and the numbers they are made of; a share of nothing is None.

    names: word -> thing, of those that count (see `read_objects`); None: the heads of the phrases that were looked for
    """
    counts = dict.fromkeys(("captions", "captions_with", "sentences", "sentences_with", "named", "not_found"), 0)
    for record in records:
        phrases = [region["phrases"][0] for region in record["regions"]]
        if names is None:
            words = {word: word for word in map(head, record.get("queries", ())) if word}
            found = set(map(head, phrases))
        else:
            words = names
            found = {thing for phrase in phrases for thing in named(phrase, names)}
        made_up = set()
        for caption in record.get("captions", ()):
            counts["captions"] += 1
            missing = [named(sentence, words) - found for sentence in SENTENCES.split(caption.strip())]
            counts["sentences"] += len(missing)
            counts["sentences_with"] += sum(map(bool, missing))
            counts["captions_with"] += any(missing)
            made_up |= set().union(*missing)
        things = named("\n".join(record.get("captions", ())), words)
        counts["named"] += len(things)
        counts["not_found"] += len(made_up)
    shares = {
        "chair_i": (counts["not_found"], counts["named"]),
        "chair_s": (counts["captions_with"], counts["captions"]),
        "sentence": (counts["sentences_with"], counts["sentences"]),
    }
    return {name: part / whole if whole else None for name, (part, whole) in shares.items()} | counts
