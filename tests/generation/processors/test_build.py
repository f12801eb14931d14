"""Options become Transformers' processors, in its order, and generate() its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from flaxqwen import generation as ours
from flaxqwen.generation.callables import TracedPytree
from flaxqwen.generation.config import GenerationConfig, resolve
from flaxqwen.generation.processors import build_processors, pad_ids
from flaxqwen.generation.sampling import TokenChoice, process
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import close, counted_compilations, padded_mask, pair, random_ids, th

V = 331
EOS = [5, 7, 100]
SEQUENCES = [[ids] for ids in range(0, 200, 7)] + [[a, b] for a in range(40) for b in range(0, 331, 11)]
SYNTHID = {"ngram_len": 3, "keys": [654, 400, 836, 123]}

OPTIONS: dict[str, dict[str, Any]] = {
    "sequence_bias": {"sequence_bias": [[ids, 4.5 if len(ids) == 1 else -6.0] for ids in SEQUENCES]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [*SEQUENCES, [5]]},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": EOS},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.6)},
    "suppress_tokens": {"suppress_tokens": list(range(0, 331, 2))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(0, 331, 2))},
    "watermark-lefthash": {"watermarking_config": {"bias": 6.0}},
    # At a ratio of 0.25 none of 40 tokens is green once in 100,000 times, and Transformers fails.
    "watermark-selfhash": {
        "watermarking_config": {"bias": 6.0, "seeding_scheme": "selfhash", "context_width": 3, "greenlist_ratio": 0.5}
    },
    "watermark-synthid": {"watermarking_config": SYNTHID},
    "renormalize_logits": {"renormalize_logits": True},
}
SAMPLING = {
    "do_sample": True, "temperature": 0.8, "top_h": 0.9, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.97,
    "epsilon_cutoff": 2e-4, "eta_cutoff": 3e-4,
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> Callable[[int], tuple[Any, Model]]:
    """(Transformers' model, ours) of a seed; the weights differ and the programs do not."""

    def make(seed: int) -> tuple[Any, Model]:
        theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, seed=seed, num_hidden_layers=1)
        return theirs, Model(module, params, module.config, GenerationConfig())

    return make


def their_options(options: dict[str, Any]) -> dict[str, Any]:
    """What Transformers takes: of watermarks, a config object."""
    import transformers

    config = options.get("watermarking_config")
    if config is None:
        return options
    kind = transformers.SynthIDTextWatermarkingConfig if "ngram_len" in config else transformers.WatermarkingConfig
    return options | {"watermarking_config": kind(**config)}


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_tokens_are_theirs(name: str, models: Any, rng: np.random.Generator) -> None:
    options = OPTIONS[name] | {"max_new_tokens": 17, "eos_token_id": EOS, "pad_token_id": 3, "do_sample": False}
    length = 1 if name == "forced_bos_token_id" else 13
    changed = name in ("remove_invalid_values", "renormalize_logits")
    for attempt, seed in enumerate(rng.integers(0, 1000, 20)):
        if attempt >= 3 and changed:
            break
        theirs, mine = models(int(seed))
        ids = random_ids(rng, (3, length))
        mask = padded_mask([13, 4, 9], 13, "left") if length == 13 else np.ones_like(ids)
        want = theirs.generate(th(ids), attention_mask=th(mask), **their_options(options))
        np.testing.assert_array_equal(mine.generate(ids, attention_mask=mask, **options), want)
        if not changed:
            without = {option: value for option, value in options.items() if option not in OPTIONS[name]}
            plain = theirs.generate(th(ids), attention_mask=th(mask), **without)
            changed = want.shape != plain.shape or bool((want != plain).any())
    assert changed


def everything(**more: Any) -> dict[str, Any]:
    """All options at once, so that their order shows."""
    options: dict[str, Any] = {"repetition_penalty": 1.2, "min_new_tokens": 4, **SAMPLING, **more}
    for name, one in OPTIONS.items():
        if not name.startswith("watermark-"):
            options |= one
    options["suppress_tokens"] = [1, 2]
    return options | {"eos_token_id": EOS, "pad_token_id": 3, "max_new_tokens": 6}


@pytest.mark.parametrize("watermark", [{"bias": 2.0}, SYNTHID], ids=["green-list", "synthid"])
def test_order_is_theirs(watermark: dict[str, Any], models: Any, rng: np.random.Generator) -> None:
    """The types, and the scores of a first token to which all of them have been applied."""
    theirs, _ = models(3)
    ids, options = random_ids(rng, (2, 9)), everything(watermarking_config=watermark)
    found: list[str] = []
    logits = theirs(th(ids)).logits[:, -1].detach()

    def loop(model: Any, input_ids: Any, logits_processor: Any, **_: Any) -> Any:
        found.extend(type(processor).__name__ for processor in logits_processor)
        scores = logits
        for processor in logits_processor:
            scores = processor(input_ids, scores)
        return scores

    want = theirs.generate(th(ids), custom_generate=loop, **their_options(options)).numpy()
    found.remove("MinNewTokensLengthLogitsProcessor")  # MinLength does both here
    resolved = resolve(GenerationConfig(), None, options, input_length=9, max_position_embeddings=128)
    built = build_processors(resolved, ids, np.ones(ids.shape, bool), 1, V)
    assert [type(processor).__name__ for processor in built] == found
    choice = TokenChoice(built, pad_ids(EOS), 3, 0)
    got = np.asarray(jax.jit(process)(choice.processors, np.pad(ids, ((0, 0), (0, 7))), logits.numpy(), 9))
    lowest = np.finfo(np.float32).min
    np.testing.assert_array_equal(np.maximum(got, lowest) == lowest, np.maximum(want, lowest) == lowest)
    kept = want > lowest
    close(got[kept], want[kept])
    assert 0 < kept.sum() < 0.5 * kept.size


@pytest.mark.parametrize(("eos", "least"), [(EOS, 4), ([5], 2), (None, 2)], ids=str)
def test_beams_keep_a_token_that_does_not_end_them(eos: Any, least: int) -> None:
    sampling = resolve(
        GenerationConfig(), None, SAMPLING | {"eos_token_id": eos}, input_length=9, max_position_embeddings=99
    )
    options: Any = SimpleNamespace(**(vars(sampling) | {"num_beams": 2}))
    built = build_processors(options, np.ones((1, 9), np.int32), np.ones((1, 9), bool), 2, V)
    keeping: list[Any] = [processor for processor in built if hasattr(processor, "min_tokens_to_keep")]
    assert [type(processor) for processor in keeping] == [
        ours.TopKLogitsWarper, ours.TopPLogitsWarper, ours.MinPLogitsWarper, ours.TypicalLogitsWarper,
        ours.EpsilonLogitsWarper, ours.EtaLogitsWarper,
    ]  # fmt: skip
    assert {processor.min_tokens_to_keep for processor in keeping} == {least}


def test_custom_processors_come_before_the_warpers() -> None:
    def own(input_ids: Any, scores: Any, cur_len: Any = None) -> Any:
        return scores

    def names(custom: list[Any], **options: Any) -> list[str]:
        resolved = resolve(GenerationConfig(), None, options, input_length=9, max_position_embeddings=128)
        built = build_processors(resolved, np.ones((1, 9), np.int32), np.ones((1, 9), bool), 1, V, custom)
        return [type(processor).__name__ for processor in built]

    options = {"do_sample": True, "suppress_tokens": [1], "no_repeat_ngram_size": 2}
    ngram, suppress, function = "NoRepeatNGramLogitsProcessor", "SuppressTokensLogitsProcessor", "function"
    warpers = ["TemperatureLogitsWarper", "TopKLogitsWarper"]
    assert names([own], **options) == [ngram, suppress, function, *warpers]
    temperature = ours.TemperatureLogitsWarper(2.0)
    assert names([temperature, own], **options) == [ngram, suppress, warpers[0], function, *warpers]
    with pytest.warns(UserWarning, match=rf"{ngram} in logits_processor acts in place"):
        assert names([own, ours.NoRepeatNGramLogitsProcessor(3)], **options) == [ngram, suppress, function, *warpers]


def test_values_never_compile_again(models: Any, rng: np.random.Generator) -> None:
    """Of all options at once: one program, whatever their numbers, and however many ids there are, to a point."""
    _, mine = models(5)
    base = everything(watermarking_config={"bias": 2.0}, top_k=50)
    mine.generate(random_ids(rng, (1, 9)), attention_mask=np.ones((1, 9), np.int32), **base)
    changes: list[dict[str, Any]] = [
        {"top_h": 0.5, "top_p": 0.5, "min_p": 0.2, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.2},
        {"no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 4, "encoder_repetition_penalty": 0.7},
        {"suppress_tokens": [17, 18, 19], "begin_suppress_tokens": list(range(150)), "bad_words_ids": SEQUENCES[1:]},
        {"forced_eos_token_id": [8], "forced_bos_token_id": 4, "max_new_tokens": 9},
        {"exponential_decay_length_penalty": (1, 1.1), "eos_token_id": 9},
        {"sequence_bias": [[ids, 1.0] for ids in SEQUENCES[2:]]},
        {"watermarking_config": {"bias": 1.0, "hashing_key": 77, "context_width": 2, "greenlist_ratio": 0.2}},
    ]
    with counted_compilations() as compiled:
        for change in changes:
            mine.generate(random_ids(rng, (1, 11)), attention_mask=np.ones((1, 11), np.int32), **(base | change))
    assert not compiled
    mine.generate(random_ids(rng, (1, 9)), max_new_tokens=6, watermarking_config=SYNTHID)
    other = SYNTHID | {"keys": [1, 2, 3, 4], "ngram_len": 5, "context_history_size": 7, "sampling_table_seed": 9}
    with counted_compilations() as compiled:
        mine.generate(
            random_ids(rng, (1, 11)),
            attention_mask=np.ones((1, 11), np.int32),
            max_new_tokens=6,
            watermarking_config=other,
        )
    assert not compiled


BAD = [
    ({"sequence_bias": [[[1, V], 0.5]]}, rf"vocabulary size is {V}.*\[{V}\]"),
    ({"sequence_bias": [[[1], 1]]}, "`sequence_bias` has to be"),
    ({"sequence_bias": []}, "`sequence_bias` has to be"),
    ({"sequence_bias": [[1, 2]]}, "`sequence_bias` has to be"),
    ({"bad_words_ids": []}, "`bad_words_ids` has to be"),
    ({"bad_words_ids": [[V]]}, "vocabulary size"),
    ({"bad_words_ids": [[-2]]}, "`bad_words_ids` has to be"),
    ({"forced_bos_token_id": V}, f"forced_bos_token_id={V} is out of the vocabulary"),
    ({"forced_eos_token_id": [1, -1]}, "forced_eos_token_id=-1 is out of the vocabulary"),
    ({"exponential_decay_length_penalty": [3, 1.1]}, "eos_token_id, which is not set"),
    ({"exponential_decay_length_penalty": [3], "eos_token_id": 1}, "has to be .start, factor."),
    ({"watermarking_config": {"greenlist_ratio": 1.5}}, "greenlist_ratio"),
    ({"watermarking_config": {"greenlist": 0.5}}, "watermarking_config has no greenlist; expected of greenlist_ratio"),
    ({"watermarking_config": {"ngram_len": 5}}, "no keys"),
    ({"watermarking_config": {"ngram_len": 5, "keys": [1], "sampling_table_size": 3}}, "power of two"),
    ({"do_sample": True, "min_p": 1.5}, "min_p"),
    ({"do_sample": True, "top_h": 0.0}, "top_h"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_refusals_come_before_compiling(options: dict[str, Any], message: str, models: Any) -> None:
    _, mine = models(0)
    with counted_compilations() as compiled, pytest.raises(ValueError, match=message):
        mine.generate([[1, 2]], **options)
    assert not compiled


def test_processors_are_exported_by_name() -> None:
    import flaxqwen.generation
    from flaxqwen.generation import processors

    for name in processors.__all__:
        if name in flaxqwen.generation.__all__:
            assert getattr(flaxqwen.generation, name) is getattr(processors, name)
    assert sum(name.endswith(("Warper", "Processor")) for name in flaxqwen.generation.__all__) > 20


def test_no_class_is_taken_for_another() -> None:
    """Equal structures are equal keys of jit's cache: of each class one with the same values, and a user's two."""
    exported = [getattr(ours, name) for name in ours.__all__]
    classes = [cls for cls in exported if getattr(cls, "__module__", "").startswith("flaxqwen.generation.processors.")]
    classes = [cls for cls in classes if dataclasses.is_dataclass(cls)]

    def blank(cls: type) -> Any:
        made = object.__new__(cls)
        for field in dataclasses.fields(cls):
            object.__setattr__(made, field.name, 1)
        return made

    mine = [jax.tree_util.register_dataclass(dataclasses.make_dataclass(name, ["x"])) for name in ("One", "Two")]
    trees = [*map(blank, classes), *(TracedPytree(cls(1), cls) for cls in mine)]
    structures = [jax.tree.structure(tree) for tree in trees]
    assert len(trees) > 22
    assert [sum(a == b for b in structures) for a in structures] == [1] * len(structures)
    assert all(jax.tree.map(lambda leaf: leaf, tree) == tree for tree in trees)
