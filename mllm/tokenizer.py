"""A small language model's own tokenizer: sentencepiece BPE, wrapped as a fast tokenizer of transformers.

Each digit is one token, ", " inside a box is one token, the turn marks are one token each, and a word never seen is
spelled with subwords and, at last, bytes. The sentencepiece model is kept beside the fast tokenizer and both encode alike.
"""

import io
import json
import string
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from encoder.errors import DataError
from mllm.box_text import BoxCodec
from mllm.conversation import IMAGE
from mllm.regions import REGION_TOKEN

SPACE = "\u2581"  # sentencepiece's visible space
# Pieces always cut out whole. A box is then "[" + 3 digits + ", " + ... + "]": 17 tokens.
SYMBOLS = (f",{SPACE}", f"{SPACE}[", "[", "]", "USER:", f"{SPACE}ASSISTANT:", f"USER:{SPACE}")
PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """A sentencepiece BPE model, serialised. The set of texts decides, not their order or number.

    vocab_size: at most so many pieces with special tokens, bytes and symbols; fewer where the texts do not yield them
    """
    corpus = sorted(set(texts))
    if not corpus:
        raise DataError("there is no text to train a tokenizer on; name conversation files in tokenizer_data")
    # Every letter and sign is a piece of its own, so that a new name is spelled with letters before bytes.
    corpus += [string.ascii_letters, string.punctuation]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=list(SYMBOLS),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"sentencepiece cannot train {vocab_size} pieces ({error}); choose another vocab_size") from error
    return model.getvalue()


def fast_tokenizer(model_proto: bytes, max_length: int) -> PreTrainedTokenizerFast:
    """The fast tokenizer that encodes as sentencepiece does, with the picture's mark as one more special token."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    size = pieces.get_piece_size()
    names = [pieces.id_to_piece(i) for i in range(size)]
    special = {i for i in range(size) if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i)}
    learned = {names[i]: pieces.get_score(i) for i in range(size) if i not in special and names[i] not in SYMBOLS}
    # sentencepiece joins the adjacent pair whose joined piece scores best; as merges: every way to cut every piece.
    merges = sorted(
        (-score, piece[:cut], piece[cut:])
        for piece, score in learned.items()
        for cut in range(1, len(piece))
        if piece[:cut] in learned and piece[cut:] in learned
    )
    tokenizer = Tokenizer(
        BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[(left, right) for _, left, right in merges],
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    symbols = "|".join(_escape(symbol) for symbol in sorted(SYMBOLS, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(symbols), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    add_image_token(fast)
    return fast


def _escape(text: str) -> str:
    return "".join(f"\\{c}" if c in "[]" else c for c in text)


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the picture's mark, added as a special token where the tokenizer lacks it; sets a pad token if none."""
    if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE)


def add_region_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the mark that region tokens take the place of, added as a special token where the tokenizer lacks it."""
    if tokenizer.convert_tokens_to_ids(REGION_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [REGION_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer.convert_tokens_to_ids(REGION_TOKEN)


def add_codec_tokens(tokenizer: PreTrainedTokenizerBase, codec: BoxCodec) -> None:
    """Adds the tokens that a codec writes boxes with, if any. Ordinary ones, so that an answer decodes with them."""
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in codec.tokens])


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, model_proto: bytes | None) -> None:
    """Writes the fast tokenizer and, where it is made from one, sentencepiece's `tokenizer.model` beside it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if config["tokenizer_class"] == "TokenizersBackend":
        # transformers 5 writes a class name that transformers 4 does not know; both know this one.
        path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    if model_proto is not None:
        (folder / "tokenizer.model").write_bytes(model_proto)
