"""A text tower's tokenizer trained on its own captions: sentencepiece unigram behind T5's special tokens.

The paper's text tower uses T5's tokenizer on lower-cased text (arXiv 2410.02746, Table A), which is not shipped in any
package; this makes one of the same class, with pad 0, end 1 and unknown 2, for a model trained from scratch.
"""

import io
import re
import string
from collections.abc import Iterable

import sentencepiece
from transformers import T5Tokenizer

from encoder.errors import DataError


def train_text_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> T5Tokenizer:
    """Trains on lower-cased `texts`; every printable ASCII character is in the vocabulary, so a new name is spelled out.

    vocab_size: at most so many pieces, special tokens included; fewer where the texts do not yield them. DataError where it
        is fewer than the texts have characters
    max_length: longest sequence in tokens, end token included
    """
    model = io.BytesIO()
    # Sorted and distinct: the vocabulary then depends on the set of texts, not on their order or number.
    corpus = sorted({text.lower() for text in texts}) + [" ".join(string.printable.lower().strip())]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_name="nmt_nfkc_cf",
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        least = re.search(r"\d+ vs (\d+)", str(error))  # of characters and special tokens
        raise DataError(
            f"vocab_size {vocab_size} is too small for a tokenizer of these {len(corpus) - 1} different texts; "
            f"give {f'at least the {least[1]} of their characters' if least else 'a few hundred'}"
        ) from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_length, clean_up_tokenization_spaces=False)
