"""Labels images with captions and regions (VESL): the same shards come back, ready for pretraining.

    python scripts/label_regions.py SHARDS OUTPUT --captioner llava-hf/llava-1.5-7b-hf
    python scripts/label_regions.py SHARDS OUTPUT --labels ngrams
    python scripts/label_regions.py IMAGES OUTPUT --captioner keep --detector weights/cloc --stats --tokenizer weights/cloc

SHARDS: WebDataset tars as img2dataset writes them, or region shards; a folder, a pattern in quotes, a URL. IMAGES: a folder.
The same command again goes on where it was stopped. docs/labelling.md says more.
"""

import argparse
from collections import Counter
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from encoder.errors import DataError, run_main
from encoder.vesl.cloc_detector import PROPOSALS
from encoder.vesl.hallucination import hallucination, read_objects
from encoder.vesl.inputs import open_input
from encoder.vesl.parts import OPENAI7, OWLV2, captioner_part, detector_part, phrases_part
from encoder.vesl.phrases import RULES, TAGGERS
from encoder.vesl.pipeline import label, run_here
from encoder.vesl.ray_engine import RayEngine
from encoder.vesl.sample_page import page
from encoder.vesl.stage_files import STAGES, LabelFolder, write_json
from encoder.vesl.stages import LabelJob
from encoder.vesl.statistics import labelled_records, statistics, table_row, token_lengths
from mllm.captioner import MllmCaptioner

NGRAMS_MIN_SCORE = 0.3  # OWLv2's own labelling (arXiv 2306.09683, Appendix A.7)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="shards, or a folder of images")
    parser.add_argument("output", help="folder to write")
    parser.add_argument(
        "--labels",
        choices=("vesl", "ngrams"),
        default="vesl",
        help="vesl: phrases of new captions. ngrams: of the alt-text, as OWLv2 labels, the paper's baseline",
    )
    parser.add_argument("--stages", help=f"to run now, with commas between: {','.join(STAGES)} (default: all)")
    parser.add_argument("--redo", choices=STAGES, metavar="STAGE", help="throw away what a stage and those after it wrote")
    parser.add_argument("--limit", type=int, help="label the first N images only")
    parser.add_argument("--shard-size", type=int, default=1000, help="images of a folder in a shard (default %(default)s)")

    group = parser.add_argument_group("captions")
    group.add_argument("--captioner", metavar="MODEL", help="its name or folder; keep: the input's own captions, or alt-text")
    group.add_argument("--prompt", help="what it is asked; {alt_text} stands for the alt-text (default: the captioner's)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="longest caption (default: the captioner's)")
    group.add_argument("--caption-batch", type=int, default=8, metavar="N", help="images in a batch (default %(default)s)")

    group = parser.add_argument_group("phrases")
    group.add_argument("--phrases", choices=RULES, help="rule (default nltk, the paper's; with --labels ngrams: ngrams)")
    group.add_argument("--tagger", choices=TAGGERS, help="who tags the words (default spacy)")
    group.add_argument("--max-phrases", type=int, metavar="N", help="of an image (default 20; of ngrams 300)")
    group.add_argument("--deduplicate", action="store_true", help="ask for a phrase once")

    group = parser.add_argument_group("detections")
    group.add_argument("--detector", metavar="MODEL", default=OWLV2, help="name or folder of an OWLv2, OWL-ViT, Grounding DINO, "
                       "or of a CLOC (default %(default)s, the paper's)")  # fmt: skip
    group.add_argument("--image-size", type=int, metavar="PX", help="side of the detector's input (default 448; a CLOC's own)")
    group.add_argument("--proposals", choices=PROPOSALS, help="where a CLOC's boxes come from (default text; see the guide)")
    group.add_argument("--min-score", type=float, metavar="X", help="keep boxes above (default 0.1; with --labels ngrams 0.3)")
    group.add_argument("--nms-iou", type=float, metavar="X", help="leave out boxes that overlap a better one by more")
    group.add_argument("--templates", nargs="+", metavar="TEXT", help="sentences with {} for the phrase, averaged; or openai7")
    group.add_argument("--detection-batch", type=int, default=8, metavar="N", help="images in a batch (default %(default)s)")

    group = parser.add_argument_group("where it runs")
    group.add_argument("--engine", choices=("local", "ray"), default="local", help="this process, or Ray (default local)")
    group.add_argument("--workers", type=int, default=2, metavar="N", help="local: threads that decode images; ray: processes "
                       "of a stage with a model, each with a GPU where there are any (default %(default)s)")  # fmt: skip
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of a process with a model (default: torch's)")
    group.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the models (default float32)")

    group = parser.add_argument_group("statistics")
    group.add_argument("--stats", action="store_true", help="write statistics.json and samples.html into OUTPUT")
    group.add_argument("--tokenizer", default="google-t5/t5-base", help="whose tokens are counted (default %(default)s)")
    group.add_argument("--objects", metavar="FILE", help="things that count as made up, one a line, synonyms after commas")
    group.add_argument("--samples", type=int, default=24, metavar="N", help="images on the page (default %(default)s)")
    return parser.parse_args()


def make_job(arguments: argparse.Namespace) -> LabelJob:
    """The run that the flags describe. DataError where they do not go together."""
    ngrams = arguments.labels == "ngrams"
    if ngrams and arguments.captioner:
        raise DataError("--labels ngrams takes its phrases from the alt-text; leave --captioner out")
    templates = {"templates": OPENAI7 if arguments.templates == ["openai7"] else tuple(arguments.templates or ())}
    detector = {
        "image_size": arguments.image_size,
        "min_score": NGRAMS_MIN_SCORE if ngrams and arguments.min_score is None else arguments.min_score,
        "nms_iou": arguments.nms_iou,
        "proposals": arguments.proposals,
        "dtype": arguments.dtype,
        **(templates if arguments.templates else {}),
    }
    captioner = {"prompt": arguments.prompt, "max_new_tokens": arguments.max_new_tokens, "dtype": arguments.dtype}
    phrases = {
        "rule": arguments.phrases or ("ngrams" if ngrams else "nltk"),
        "tagger": arguments.tagger,
        "max_phrases": arguments.max_phrases,
        "deduplicate": arguments.deduplicate or None,
    }
    ours = bool(arguments.captioner) and (Path(arguments.captioner) / "grounding.json").is_file()
    captioner["cls"] = MllmCaptioner if ours else None
    captions = captioner_part(arguments.captioner, arguments.device, **given(captioner)) if arguments.captioner else None
    return LabelJob(
        LabelFolder(arguments.output),
        captioner=captions,
        phrases=phrases_part(**given(phrases)),
        detector=detector_part(arguments.detector, arguments.device, **given(detector)),
        from_alt_text=ngrams,
        source=arguments.labels,
        caption_batch=arguments.caption_batch,
        detection_batch=arguments.detection_batch,
        decoders=arguments.workers if arguments.engine == "local" else 2,
        torch_threads=arguments.threads,
    )


def given(flags: dict) -> dict:
    """Those that are not None: a part's own defaults stand for the others."""
    return {name: value for name, value in flags.items() if value is not None}


def main() -> None:
    arguments = parse_arguments()
    disable_progress_bar()  # transformers' own, which would cut through ours
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.stats else None
    names = read_objects(arguments.objects) if arguments.objects else None
    job = make_job(arguments)
    stages = arguments.stages.split(",") if arguments.stages else None
    inputs, source = open_input(arguments.input, arguments.shard_size, arguments.limit)
    engine = run_here if arguments.engine == "local" else RayEngine(arguments.workers, arguments.threads or 1)
    counts = label(job, inputs, source, stages, engine, arguments.redo)
    if arguments.stats:
        write_statistics(job.output, tokenizer, arguments, names)
    print(last_line(counts, len(inputs), job.output), flush=True)


def load_tokenizer(name: str):
    """The tokenizer, before any work is done. DataError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"tokenizer {name} cannot be had ({reason}); name another, or its folder, with --tokenizer") from error


def write_statistics(folder: LabelFolder, tokenizer, arguments: argparse.Namespace, names: dict[str, str] | None) -> None:
    """statistics.json and samples.html of all labelled shards in the folder; prints the row of Table 1."""
    found = statistics(folder, token_lengths(tokenizer))
    chair = hallucination((record for _, _, record in labelled_records(folder)), names)
    write_json(folder.path / "statistics.json", {"tokenizer": arguments.tokenizer, **found, "not_found_by_the_detector": chair})
    text = page(folder, found, chair, arguments.tokenizer, arguments.samples)
    (folder.path / "samples.html").write_text(text, encoding="utf-8")
    print(f"{table_row(found)}; see {folder.path / 'samples.html'}")


def last_line(counts: Counter, shards: int, folder: LabelFolder) -> str:
    """What there is now, and where."""
    left_out = {key.removeprefix("left_out_"): number for key, number in sorted(counts.items()) if key.startswith("left_out_")}
    reasons = ", ".join(f"{reason} {number}" for reason, number in left_out.items())
    named = f"; left out: {reasons} (see {folder.path / 'problems.txt'})" if reasons else ""
    done = f"{counts['records']} images with {counts['regions']} regions in {counts['shards']} of {shards} shards"
    return f"{done} are in {folder.path}{named}"


if __name__ == "__main__":
    run_main(main)
