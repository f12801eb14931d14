"""The classification and question-answering heads equal Transformers'."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen.models.heads import (
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)
from flaxqwen.models.losses import sequence_classification_loss
from tests.reference import close, padded_mask, pair, random_ids, th

PAD = 7
LABELS = {"num_labels": 5, "pad_token_id": PAD}
# problem_type, number of labels, labels for 3 rows
TASKS = {
    "regression": (1, lambda rng: rng.standard_normal(3).astype(np.float32)),
    "regression-several": (4, lambda rng: rng.standard_normal((3, 4)).astype(np.float32)),
    "single_label_classification": (5, lambda rng: rng.integers(0, 5, 3).astype(np.int32)),
    "multi_label_classification": (4, lambda rng: (rng.random((3, 4)) < 0.5).astype(np.float32)),
}


def same(ours, theirs):
    """Losses within 1e-6 relative."""
    ours, theirs = (x.item() for x in (ours, theirs))
    assert abs(ours - theirs) <= 1e-6 * abs(theirs)


def padded_batch(rng, side):
    ids = random_ids(rng, (3, 11))
    ids[ids == PAD] = PAD + 1
    mask = padded_mask([11, 4, 8], 11, side)
    return np.where(mask, ids, PAD).astype(np.int32), mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", [True, False], ids=["problem_type", "inferred"])
@pytest.mark.parametrize("task", TASKS)
def test_sequence_classification(task, given, side, rng):
    if task == "regression-several" and not given:
        pytest.skip("several float labels are inferred to be multi-label")
    num_labels, labels = TASKS[task]
    kind = task.removesuffix("-several")
    changes = {"num_labels": num_labels, "pad_token_id": PAD, "problem_type": kind if given else None}
    theirs, module, params = pair("Qwen2ForSequenceClassification", Qwen2ForSequenceClassification, **changes)
    ids, mask = padded_batch(rng, side)
    labels = labels(rng)
    want = theirs(input_ids=th(ids), attention_mask=th(mask), labels=th(labels))
    got = module.apply({"params": params}, ids, mask, labels=labels)
    close(got.logits, want.logits)
    # From the same logits: those of a few rows near their labels make a loss that is worse conditioned than they are.
    same(sequence_classification_loss(jnp.asarray(want.logits.detach()), labels, kind if given else None), want.loss)
    same(got.loss, sequence_classification_loss(got.logits, labels, kind))


def test_sequence_classification_needs_a_pad_token(rng):
    theirs, module, params = pair("Qwen2ForSequenceClassification", Qwen2ForSequenceClassification, num_labels=3)
    one = random_ids(rng, (1, 6))
    close(module.apply({"params": params}, one).logits, theirs(input_ids=th(one)).logits)
    with pytest.raises(ValueError, match="pad_token_id"):
        module.apply({"params": params}, random_ids(rng, (2, 6)))


def test_token_classification(rng):
    theirs, module, params = pair("Qwen2ForTokenClassification", Qwen2ForTokenClassification, **LABELS)
    ids, mask = padded_batch(rng, "right")
    labels = np.where(mask, rng.integers(0, 5, ids.shape), -100).astype(np.int32)
    want = theirs(input_ids=th(ids), attention_mask=th(mask), labels=th(labels))
    got = module.apply({"params": params}, ids, mask, labels=labels)
    close(got.logits, want.logits, where=mask.astype(bool))
    same(got.loss, want.loss)


@pytest.mark.parametrize(
    "head", [Qwen2ForSequenceClassification, Qwen2ForTokenClassification, Qwen2ForQuestionAnswering]
)
def test_return_dict_of_the_config(head, rng):
    _, module, params = pair(head.__name__, head)
    plain = module.clone(config=dataclasses.replace(module.config, return_dict=False))
    ids = random_ids(rng, (1, 6))
    whole, parts = (jax.jit(m.apply)({"params": params}, ids) for m in (module, plain))
    assert isinstance(parts, tuple)
    assert np.array_equal(parts[0], whole.to_tuple()[0])


def test_token_classification_drops_out_when_training(rng):
    """The head's dropout, 0.1 by default as in Transformers, acts on the last hidden states."""
    _, module, params = pair("Qwen2ForTokenClassification", Qwen2ForTokenClassification, **LABELS)
    ids, _ = padded_batch(rng, "right")
    still = module.apply({"params": params}, ids).logits
    keys = {"dropout": jax.random.key(3)}
    moved = module.apply({"params": params}, ids, deterministic=False, rngs=keys).logits
    assert np.abs(still - moved).max() > 1e-3


@pytest.mark.parametrize("outside", [False, True])
def test_question_answering(outside, rng):
    theirs, module, params = pair("Qwen2ForQuestionAnswering", Qwen2ForQuestionAnswering)
    assert "transformer" in params
    ids, mask = padded_batch(rng, "right")
    start, end = (rng.integers(0, 4, 3).astype(np.int32) for _ in range(2))
    if outside:
        end[1] = 99
    want = theirs(input_ids=th(ids), attention_mask=th(mask), start_positions=th(start), end_positions=th(end))
    got = module.apply({"params": params}, ids, mask, start_positions=start, end_positions=end)
    close(got.start_logits, want.start_logits, where=mask.astype(bool))
    close(got.end_logits, want.end_logits, where=mask.astype(bool))
    same(got.loss, want.loss)


@pytest.mark.parametrize(
    ("kind", "count", "shape"),
    [("multi_label_classification", 1, (2,)), ("multi_label_classification", 3, (1, 3)), ("regression", 4, (8,))],
)
def test_scores_need_a_label_each(kind, count, shape):
    """As in PyTorch: nothing is broadcast, and nothing brought into another shape."""
    with pytest.raises(ValueError, match=rf"labels are .*; expected \[2, {count}\], one for each score"):
        sequence_classification_loss(jnp.zeros((2, count)), jnp.zeros(shape), kind)


def test_a_negative_padding_is_counted_from_the_end(rng):
    """nn.Embedding(padding_idx=-1) is the last row, of which a lookup trains nothing."""
    theirs, module, params = pair("Qwen2ForTokenClassification", Qwen2ForTokenClassification, pad_token_id=-1)
    ids = random_ids(rng, (2, 5))
    ids[0, 3] = 330
    labels = rng.integers(0, 2, ids.shape).astype(np.int32)
    theirs(input_ids=th(ids), labels=th(labels)).loss.backward()
    gradient = jax.jit(jax.grad(lambda p: module.apply({"params": p}, ids, labels=labels).loss))(params)
    found = gradient["model"]["embed_tokens"]["weight"]
    close(found, theirs.model.embed_tokens.weight.grad, 1e-4)
    assert not np.any(found[330])
