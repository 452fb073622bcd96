"""Sentences around a class name: OpenAI's 80 ImageNet templates, the name alone, or one of your own."""

from encoder.errors import DataError

# github.com/openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb, by pattern.
_ART = "sculpture, rendering, tattoo, drawing, painting, sketch, doodle, rendition".split(", ")
_BARE_ART = ("graffiti of", "art of", "itap of")
_PHOTO = "bad, low resolution, cropped, bright, dark, close-up, black and white, pixelated, jpeg corrupted, blurry, good"
_ADJECTIVE = "hard to see, clean, dirty, cool, large, nice, weird, small".split(", ")
_MATERIAL = "embroidered, plastic, origami, toy, cartoon, plushie".split(", ")
OPENAI80 = (
    *(f"a {art} of {article} {{}}." for art in _ART for article in ("a", "the")),
    *(f"{art} {article} {{}}." for art in _BARE_ART for article in ("a", "the")),
    *(f"a {photo} photo of {article} {{}}." for photo in _PHOTO.split(", ") for article in ("a", "the")),
    *(f"a photo of {article} {adjective} {{}}." for adjective in _ADJECTIVE for article in ("a", "the")),
    *(f"{article} {material} {{}}." for material in _MATERIAL for article in ("a", "the")),
    *("a photo of a {}.", "a photo of the {}.", "a {} in a video game.", "the {} in a video game."),
    *("a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."),
)


def templates_named(text: str) -> tuple[str, ...]:
    """`name` (the class name alone, as CLOC does), `openai80`, or one template of your own that holds `{}`."""
    named = {"name": ("{}",), "openai80": OPENAI80}
    if text in named:
        return named[text]
    if text.count("{}") != 1:
        raise DataError(f"--templates is '{text}'; give 'name', 'openai80' or a sentence with one {{}} for the name")
    return (text,)
