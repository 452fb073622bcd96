"""The box parser under random and adversarial answers: never an exception, every refusal with a reason.

By hypothesis a thousand cases by default, as many as BOX_FUZZ_CASES says otherwise; 100,000 more from a seed.
"""

import os
import random
import re

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mllm.box_text import CODECS, BoxCodec

CASES = int(os.environ.get("BOX_FUZZ_CASES", "1000"))
pytestmark = pytest.mark.timeout(max(600, CASES // 10))  # seconds; 100,000 cases take minutes
corners = st.tuples(*[st.floats(0, 1)] * 4)
box = corners.map(lambda c: torch.tensor([min(c[0::2]), min(c[1::2]), max(c[0::2]), max(c[1::2])]))
written = st.builds(lambda name, value: BoxCodec(name).encode(value), st.sampled_from(CODECS), box)
# What a box is made of, what it is mistaken for, and digits that `\d` and int() take but no codec writes.
fragments = st.one_of(
    written,
    st.integers(-9, 10_000).map(str),
    st.integers(0, 999).map("{:03d}".format),
    st.floats().map(str),
    st.integers(-1, 1024).map("<loc_{}>".format),
    st.integers(0, 1024).map("<loc{:04d}>".format),
    st.sampled_from(["[", "]", ", ", ",", " ", ".", "-", "\n", "\0", "[[", "]]", "<", ">", "loc", "e", "nan", "inf", "0x1"]),
    st.sampled_from(["\u0660\u0661\u0662", "\uff11\uff12\uff13", "\u00b2\u00b2\u00b2", "\u0967\u0968\u0969", "\u2212", "\u00a0"]),
    st.text(max_size=8),
)


def damaged(answer: str, place: int, put: str) -> str:
    """One character replaced, dropped or added."""
    return answer[: place % (len(answer) + 1)] + put + answer[place % (len(answer) + 1) + (place % 2) :]


answers = st.one_of(
    st.text(max_size=80),
    st.lists(fragments, max_size=14).map("".join),
    st.builds(damaged, written, st.integers(0, 200), st.text(max_size=2)),
    st.tuples(fragments, written, fragments).map("".join),
)


@given(answers, st.sampled_from(CODECS))
@example("[\u0660\u0661\u0662, 345, 678, 999]", "int1000")
@example("[" * 10_000, "int1000")
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_a_box_inside_the_square_or_has_a_reason(answer, codec):
    found, reason = BoxCodec(codec).decode(answer)
    if found is None:
        assert isinstance(reason, str) and len(reason) > 5 and "\n" not in reason
        return
    assert reason is None
    x1, y1, x2, y2 = found.tolist()
    assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def test_a_hundred_thousand_answers_of_fragments():
    """What hypothesis has no time for in a test run: many long mixtures of pieces of boxes, from a seed."""
    rng, kinds = random.Random(0), {True: 0, False: 0}
    digits = ["7", "45", "012", "999", "1000", "0.12", "0.123", "1.000", "-3", "\u0660\u0661\u0662", "\u00b2\u00b2\u00b2"]
    pieces = [*digits, "[", "]", ", ", ",", " ", "<loc_", ">", "><loc_", "[012, 345, 678, 999]", "[0.012, 0.345, 0.678, 0.999]"]
    codecs = [BoxCodec(name) for name in CODECS]
    for number in range(100_000):
        if number % 2:
            answer = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        else:  # four numbers in a codec's own marks: in order, out of order, out of range
            codec = codecs[number // 2 % len(codecs)]
            answer = codec.encode(torch.tensor([0.1, 0.2, 0.3, 0.4]))
            for old in sorted(set(re.findall(r"[\d.]+", answer)), key=len, reverse=True):
                answer = answer.replace(old, rng.choice([old, old[::-1], rng.choice(digits)]), 1)
        for codec in codecs:
            found, reason = codec.decode(answer)
            assert (found is None) == (reason is not None), answer
            kinds[found is None] += 1
            if found is not None:
                x1, y1, x2, y2 = found.tolist()
                assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1, answer
    assert kinds[True] > 100_000 and kinds[False] > 10_000


def slow_int1000(answer: str) -> tuple[int, ...] | None:
    """The first box read character by character, without a regular expression; None also for one without area."""
    form = "[ddd, ddd, ddd, ddd]"
    for start in range(len(answer) - len(form) + 1):
        part = answer[start : start + len(form)]
        if all(c in "0123456789" if f == "d" else c == f for f, c in zip(form, part, strict=True)):
            x1, y1, x2, y2 = (int(part[i : i + 3]) for i in (1, 6, 11, 16))
            return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
    return None


@given(answers)
@example("[\u0660\u0661\u0662, 345, 678, 999]")
@settings(max_examples=CASES // 2, deadline=None, suppress_health_check=list(HealthCheck))
def test_int1000_agrees_with_a_reader_of_single_characters(answer):
    found, expected = BoxCodec("int1000").decode(answer)[0], slow_int1000(answer)
    assert (found is None) == (expected is None)
    if expected is not None:
        assert found.tolist() == pytest.approx([(n + 0.5) / 1000 for n in expected])
