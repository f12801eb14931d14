"""Penalties, biases and n-gram bans equal Transformers' on random text that repeats itself."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxqwen import generation as ours
from tests.generation.processors.oracle import Case, V, apply_theirs, buffered, cases, check, examples, run, theirs
from tests.reference import torch


def sequences(rng: np.random.Generator, alphabet: int) -> list[list[int]]:
    """Up to 12 different sequences of up to 5 tokens, some of which the text has."""
    found = {tuple(rng.integers(0, alphabet, rng.integers(1, 6)).tolist()) for _ in range(rng.integers(1, 13))}
    return [list(sequence) for sequence in found]


@examples
@given(cases(), st.sampled_from(["none", "int", "rows"]))
def test_repetition_penalty(case: Case, ignore: str) -> None:
    penalty = float(case.rng.uniform(0.3, 2.5))
    skip = case.rng.integers(0, case.ids.shape[1] + 1, len(case.ids))
    args = {"none": (None, None), "int": (int(skip[0]), int(skip[0])), "rows": (skip, torch.tensor(skip))}
    mine, other = args[ignore]
    mine = ours.RepetitionPenaltyLogitsProcessor(penalty, mine)
    check(mine, theirs("RepetitionPenaltyLogitsProcessor", penalty, other), case)


@examples
@given(cases(), st.sampled_from([1, 2]))
def test_encoder_repetition_penalty(case: Case, copies: int) -> None:
    """One prompt stands for `copies` rows of scores."""
    case = case._replace(ids=case.ids.repeat(copies, 0), scores=case.scores.repeat(copies, 0))
    penalty, prompt = float(case.rng.uniform(0.3, 2.5)), case.rng.integers(0, V, (len(case.ids) // copies, 11))
    mine = ours.EncoderRepetitionPenaltyLogitsProcessor(penalty, prompt)
    check(mine, theirs("EncoderRepetitionPenaltyLogitsProcessor", penalty, torch.tensor(prompt)), case)


@examples
@given(cases(alphabet=3), st.integers(1, 7))
def test_no_repeat_ngram(case: Case, size: int) -> None:
    check(ours.NoRepeatNGramLogitsProcessor(size), theirs("NoRepeatNGramLogitsProcessor", size), case)


@examples
@given(cases(alphabet=3), st.integers(1, 5), st.sampled_from([1, 2]))
def test_encoder_no_repeat_ngram(case: Case, size: int, copies: int) -> None:
    case = case._replace(ids=case.ids.repeat(copies, 0), scores=case.scores.repeat(copies, 0))
    prompt = case.rng.integers(0, 3, (len(case.ids) // copies, int(case.rng.integers(1, 30))))
    prompt = prompt[0] if len(prompt) == 1 else prompt
    mine = ours.EncoderNoRepeatNGramLogitsProcessor(size, prompt)
    check(mine, theirs("EncoderNoRepeatNGramLogitsProcessor", size, torch.tensor(prompt)), case)


@examples
@given(cases(alphabet=2), st.booleans())
def test_sequence_bias(case: Case, as_list: bool) -> None:
    listed = sequences(case.rng, 2)
    biases: Any = {tuple(ids): float(case.rng.choice([-np.inf, 10.0, case.rng.normal()])) for ids in listed}
    if as_list:
        biases = [[list(ids), bias] for ids, bias in biases.items()]
    mine, other = ours.SequenceBiasLogitsProcessor(biases), theirs("SequenceBiasLogitsProcessor", biases)
    check(mine, other, case, atol=2e-6)  # two biases of one token are added in another order


@examples
@given(cases(alphabet=2), st.sampled_from([None, 1, [0, 1]]))
def test_bad_words(case: Case, eos: Any) -> None:
    words = [*sequences(case.rng, 2), [5]]
    check(ours.NoBadWordsLogitsProcessor(words, eos), theirs("NoBadWordsLogitsProcessor", words, eos), case)


@pytest.mark.parametrize("args", [([[7]], 7), ([[7], [8]], [7, 8]), ([[]],)], ids=str)
def test_bad_words_that_ban_nothing(args: Any, rng: np.random.Generator) -> None:
    case = Case(np.ones((1, 6), np.int32), rng.standard_normal((1, V)).astype(np.float32), rng)
    want = check(ours.NoBadWordsLogitsProcessor(*args), theirs("NoBadWordsLogitsProcessor", *args), case)
    np.testing.assert_array_equal(want, case.scores)


@examples
@given(cases(), st.integers(-5, 25), st.sampled_from([0.5, 0.999, 1.0, 1.001, 1.2, 1.5, 2.0]))
def test_exponential_decay_length_penalty(case: Case, start: int, factor: float) -> None:
    eos = case.rng.choice(V, int(case.rng.integers(1, 5)), replace=False).tolist()
    args = ((start, factor), eos, int(case.rng.integers(0, 9)))
    check(ours.ExponentialDecayLengthPenalty(*args), theirs("ExponentialDecayLengthPenalty", *args), case, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0001, 1.01, 0.97])
def test_exponential_decay_of_a_long_text(factor: float, rng: np.random.Generator) -> None:
    """1.01 to the power of 2,000 loses nothing, nor does 1.0001 - 1."""
    scores = rng.standard_normal((1, V)).astype(np.float32)
    for length in (1, 2, 200, 2000):
        ids = np.ones((1, length), np.int32)
        args = ((0, factor), 7, 0)
        want = apply_theirs(theirs("ExponentialDecayLengthPenalty", *args), ids, scores)
        got = run(ours.ExponentialDecayLengthPenalty(*args), buffered(ids, 2048), scores, length)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_sequences_outside_of_programs() -> None:
    scores = jnp.zeros((1, V))
    ids = jnp.asarray([[3, 4]])
    biased = ours.SequenceBiasLogitsProcessor({(4, 5): 1.5, (4, 4, 5): 9.0, (3, 4, 5): 2.0})(ids, scores)
    assert biased[0, 5] == 3.5
    assert np.count_nonzero(biased) == 1
    for processor in (
        ours.SequenceBiasLogitsProcessor({(1, V): 0.5}),
        ours.NoBadWordsLogitsProcessor([[V, 1]]),
    ):
        with pytest.raises(ValueError, match=rf"vocabulary size is {V}.*\[{V}\]"):
            processor(ids, scores)
    with pytest.raises(ValueError, match="vocabulary size"):
        apply_theirs(theirs("NoBadWordsLogitsProcessor", [[V, 1]]), np.asarray(ids), np.asarray(scores))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("RepetitionPenaltyLogitsProcessor", (2,)),
        ("RepetitionPenaltyLogitsProcessor", (-1.0,)),
        ("RepetitionPenaltyLogitsProcessor", (1.5, -2)),
        ("EncoderRepetitionPenaltyLogitsProcessor", (2, np.ones((1, 2), int))),
        ("EncoderRepetitionPenaltyLogitsProcessor", (0.0, np.ones((1, 2), int))),
        ("NoRepeatNGramLogitsProcessor", (0,)),
        ("NoRepeatNGramLogitsProcessor", (1.5,)),
        ("EncoderNoRepeatNGramLogitsProcessor", (0, np.ones((1, 2), int))),
        ("SequenceBiasLogitsProcessor", ({},)),
        ("SequenceBiasLogitsProcessor", ([],)),
        ("SequenceBiasLogitsProcessor", (None,)),
        ("SequenceBiasLogitsProcessor", ({1: 0.5},)),
        ("SequenceBiasLogitsProcessor", ({(): 0.5},)),
        ("SequenceBiasLogitsProcessor", ({(-1,): 0.5},)),
        ("SequenceBiasLogitsProcessor", ({(1,): 1},)),
        ("SequenceBiasLogitsProcessor", ([[[1], 1]],)),
        ("SequenceBiasLogitsProcessor", ([[["1"], 1.0]],)),
        ("NoBadWordsLogitsProcessor", ([],)),
        ("NoBadWordsLogitsProcessor", (None,)),
        ("NoBadWordsLogitsProcessor", ([1, 2],)),
        ("NoBadWordsLogitsProcessor", ([[-1]],)),
        ("NoBadWordsLogitsProcessor", ([["a"]],)),
        ("ExponentialDecayLengthPenalty", ((5, 1.1), [-1], 3)),
        ("ExponentialDecayLengthPenalty", ((5, 1.1), 1.5, 3)),
    ],
    ids=str,
)
def test_refusals_are_theirs(name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises((ValueError, TypeError)):  # torch refuses some before they are looked at
        theirs(name, *args)
    with pytest.raises(ValueError, match="has to be"):
        getattr(ours, name)(*args)


@pytest.mark.parametrize("penalty", [(5,), (5, 0.0), (5, -1.1), None])
def test_a_decay_that_is_no_pair_is_refused(penalty: Any) -> None:
    with pytest.raises(ValueError, match="exponential_decay_length_penalty"):
        ours.ExponentialDecayLengthPenalty(penalty, 1, 3)
