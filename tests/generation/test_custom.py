"""A user's own processors, allowed tokens, transition scores: equal to Transformers', compiled where they can be."""

from __future__ import annotations

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generation.test_generate import EOS, models
from tests.reference import (
    close,
    counted_compilations,
    padded_mask,
    params_of,
    random_ids,
    th,
    tiny,
    torch,
    torch_model,
)

HOST = "ignore:.*called on the host"
LENGTH = {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": 3}


@pytest.fixture(scope="module")
def pair_of_models():
    return models(max_position_embeddings=2048, num_hidden_layers=1)


# One processor, written four ways: 7 less for tokens whose parity is that of the newest one.


def traced(input_ids, scores, cur_len):
    newest = jnp.take(input_ids, cur_len - 1, axis=1)[:, None]
    return scores - 7.0 * (jnp.arange(scores.shape[1]) % 2 == newest % 2)


def by_jnp_without_cur_len(input_ids, scores):
    return scores - 7.0 * (jnp.arange(scores.shape[1]) % 2 == input_ids[:, -1:] % 2)


def by_numpy(input_ids, scores):
    scores[:] -= np.float32(7) * (np.arange(scores.shape[1]) % 2 == np.asarray(input_ids)[:, -1:] % 2)
    return scores


def by_torch(input_ids, scores):
    return scores - 7.0 * torch.eq(torch.arange(scores.shape[1])[None] % 2, input_ids[:, -1:] % 2)


@pytest.mark.filterwarnings(HOST)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_processors_of_users(padded, rng, pair_of_models):
    theirs, mine = pair_of_models
    ids = random_ids(rng, (3, 8))
    mask = padded_mask([8, 3, 6], 8, "left") if padded else np.ones_like(ids)
    # Processors of options before it, and after.
    options = {**LENGTH, "repetition_penalty": 1.3, "suppress_tokens": [4, 9], "min_new_tokens": 2}
    options |= {"return_dict_in_generate": True, "output_scores": True, "renormalize_logits": True}
    want = theirs.generate(th(ids), attention_mask=th(mask), do_sample=False, logits_processor=[by_torch], **options)
    for processor in (traced, by_jnp_without_cur_len, by_numpy, by_torch):
        got = mine.generate(ids, attention_mask=mask, logits_processor=[processor], **options)
        np.testing.assert_array_equal(got.sequences, want.sequences, err_msg=processor.__name__)
        for ours, other in zip(got.scores, want.scores, strict=True):
            finite = np.isfinite(other.numpy())
            np.testing.assert_array_equal(finite, np.isfinite(ours))
            close(ours, other, where=finite)


def test_traced_ones_never_compile_twice_nor_warn(rng, pair_of_models):
    _, mine = pair_of_models

    class Scale:
        """Unhashable, with a bound method."""

        __hash__ = None

        def __call__(self, input_ids, scores):
            return scores * 2.0

        def shift(self, input_ids, scores, cur_len=None):
            return jnp.roll(scores, 3, axis=1) + cur_len

    scale = Scale()
    for processor, tokens in ((traced, 6), (scale, 1), (jax.jit(traced), 1)):
        mine.generate(random_ids(rng, (3, 5)), logits_processor=[processor], max_new_tokens=tokens)
        with counted_compilations() as compiled:
            mine.generate(random_ids(rng, (3, 9)), logits_processor=[processor], max_new_tokens=tokens)
        assert not compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scale, "__hash__", object.__hash__)
        mine.generate(random_ids(rng, (3, 5)), logits_processor=[scale.shift], max_new_tokens=1)
        with counted_compilations() as compiled:
            mine.generate(random_ids(rng, (3, 5)), logits_processor=[scale.shift], max_new_tokens=1)
        assert not compiled


@pytest.mark.filterwarnings(HOST)
def test_sampling_is_the_same_on_the_host(rng, pair_of_models):
    """The warpers come after the user's processors, and the draws are those of the compiled loop."""
    _, mine = pair_of_models
    ids = random_ids(rng, (3, 5))
    options = {**LENGTH, "do_sample": True, "temperature": 1.4, "top_k": 40, "seed": 5, "num_return_sequences": 2}
    want = mine.generate(ids, logits_processor=[traced], **options)
    np.testing.assert_array_equal(mine.generate(ids, logits_processor=[by_numpy], **options), want)


@pytest.mark.filterwarnings(HOST)
def test_order_of_several(rng, pair_of_models):
    """Traced ones and host ones act in the order given."""
    _, mine = pair_of_models
    ids = random_ids(rng, (2, 5))

    def double(input_ids, scores, cur_len):
        return scores * 2.0

    def plus(input_ids, scores):
        return np.asarray(scores) + np.arange(331, dtype=np.float32) % 5

    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for processors in ([double, plus], [plus, double], [double, plus, double]):
        got = mine.generate(ids, logits_processor=processors, **options)
        want = got.logits[0]
        for processor in processors:
            want = processor(None, want, None) if processor is double else processor(None, want)
        close(got.scores[0], want)


@pytest.mark.filterwarnings(HOST)
def test_their_processors_and_ours(rng, pair_of_models):
    import transformers

    from flaxqwen import generation

    theirs, mine = pair_of_models
    ids = random_ids(rng, (2, 7))
    for name, arguments in (
        ("NoRepeatNGramLogitsProcessor", (2,)),
        ("RepetitionPenaltyLogitsProcessor", (1.4,)),
        ("SuppressTokensLogitsProcessor", ([3, 8],)),
    ):
        other = transformers.LogitsProcessorList([getattr(transformers, name)(*arguments)])
        want = theirs.generate(th(ids), do_sample=False, logits_processor=other, **LENGTH)
        np.testing.assert_array_equal(mine.generate(ids, logits_processor=other, **LENGTH), want)
        ours = [getattr(generation, name)(*arguments)]
        np.testing.assert_array_equal(mine.generate(ids, logits_processor=ours, **LENGTH), want)


@pytest.mark.filterwarnings(HOST)
def test_their_processor_acts_in_place_of_the_options(rng, pair_of_models):
    import transformers

    theirs, mine = pair_of_models
    ids = random_ids(rng, (2, 7))
    options = {**LENGTH, "repetition_penalty": 1.1}
    options["logits_processor"] = transformers.LogitsProcessorList([transformers.RepetitionPenaltyLogitsProcessor(3.0)])
    want = theirs.generate(th(ids), do_sample=False, **options)
    with pytest.warns(UserWarning, match="RepetitionPenaltyLogitsProcessor in logits_processor acts in place"):
        got = mine.generate(ids, **options)
    np.testing.assert_array_equal(got, want)


def test_what_is_compiled_is_what_is_called(rng, pair_of_models):
    """An attribute that changes between calls acts; with what changes at each call nothing is compiled in."""
    _, mine = pair_of_models
    ids = random_ids(rng, (2, 7))
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}

    class Scaled:
        factor = 1.0

        def __call__(self, input_ids, scores):
            return scores * self.factor

    class Cooling(Scaled):
        def __call__(self, input_ids, scores):
            self.factor *= 0.5
            return scores * self.factor

    scaled = Scaled()
    for factor in (1.0, 5.0):
        scaled.factor = factor
        output = mine.generate(ids, logits_processor=[scaled], **options)
        close(output.scores[-1], factor * np.asarray(output.logits[-1]))
    with counted_compilations() as compiled:
        mine.generate(ids, logits_processor=[scaled], **options)
    assert not compiled
    with pytest.warns(UserWarning, match="Cooling: called on the host"):
        output = mine.generate(ids, logits_processor=[Cooling()], **options)
    ratios = [np.asarray(s)[0, 0] / np.asarray(x)[0, 0] for s, x in zip(output.scores, output.logits, strict=True)]
    np.testing.assert_allclose(np.divide(ratios[1:], ratios[:-1]), 0.5, rtol=1e-6)

    def noisy(input_ids, scores):
        return scores + np.random.gumbel(size=scores.shape).astype(np.float32)

    def sees(input_ids, scores):
        return jnp.where(jnp.any(input_ids == int(ids[0, 0])), -scores, scores)

    for function in (noisy, sees):
        with pytest.warns(UserWarning, match=f"{function.__name__}: called on the host"):
            output = mine.generate(ids, logits_processor=[function], **options)
    close(output.scores[0], -np.asarray(output.logits[0]))


def test_one_that_looks_is_called_at_every_step(rng, pair_of_models):
    _, mine = pair_of_models
    lengths = []

    def look(input_ids, scores):
        lengths.append(input_ids.shape[1])
        return scores

    with pytest.warns(UserWarning, match="look: called on the host"):
        got = mine.generate(random_ids(rng, (2, 7)), logits_processor=[look], max_new_tokens=4)
    assert lengths == [7, 8, 9, 10]
    assert got.shape == (2, 11)


@pytest.mark.filterwarnings(HOST)
def test_allowed_tokens(rng, pair_of_models):
    """15 models, with two sets of options each."""
    _, mine = pair_of_models

    def allowed(row, tokens):
        return [int(tokens[-1]) % 50, 60 + row, len(tokens) + 100, 5]

    options = {**LENGTH, "repetition_penalty": 1.5, "suppress_tokens": [60], "prefix_allowed_tokens_fn": allowed}
    for seed in rng.integers(0, 2**31, 15):
        theirs = torch_model(
            "Qwen2ForCausalLM", tiny(max_position_embeddings=2048, num_hidden_layers=1), seed=int(seed)
        )
        mine, ids = replace(mine, params=params_of(theirs)), random_ids(rng, (2, 6))
        for more in ({}, {"bad_words_ids": [[61], [60]], "forced_eos_token_id": 7}):
            want = theirs.generate(th(ids), do_sample=False, **options, **more)
            np.testing.assert_array_equal(mine.generate(ids, **options, **more), want)


@pytest.mark.filterwarnings(HOST)
def test_allowed_tokens_that_are_banned_are_forced(rng, pair_of_models):
    theirs, mine = pair_of_models
    ids = random_ids(rng, (1, 6))
    options = {"bad_words_ids": [[17]], "prefix_allowed_tokens_fn": lambda row, tokens: [17], "max_new_tokens": 3}
    want = theirs.generate(th(ids), do_sample=False, **options)
    np.testing.assert_array_equal(mine.generate(ids, **options), want)


@pytest.mark.filterwarnings(HOST)
def test_a_beam_without_allowed_tokens_dies(rng, pair_of_models):
    """They are forced where all beams of a prompt are without, and not on one of them."""
    theirs, mine = pair_of_models
    ids = random_ids(rng, (2, 6))

    def allowed(row, tokens):
        return [8] if int(tokens[-1]) % 2 else [n for n in range(331) if n != 8]

    options = {**LENGTH, "eos_token_id": 8, "num_beams": 3, "min_new_tokens": 5, "prefix_allowed_tokens_fn": allowed}
    options["sequence_bias"] = [[[n], 4.0] for n in range(1, 331, 2)]  # odd tokens, after which beams are dead
    want = theirs.generate(th(ids), do_sample=False, **options)
    np.testing.assert_array_equal(mine.generate(ids, **options), want)


@pytest.mark.filterwarnings(HOST)
@pytest.mark.parametrize("listed", [[], [331], [-1]], ids=str)
def test_no_allowed_token(listed, pair_of_models):
    _, mine = pair_of_models
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn returned"):
        mine.generate([[1, 2]], prefix_allowed_tokens_fn=lambda row, tokens: listed)


BAD = [
    ({"logits_processor": traced}, "must be a list"),
    ({"logits_processor": ["x"]}, "found 'x' in it"),
    ({"logits_processor": [lambda a, b, step: b]}, "needs 'step'"),
    ({"logits_processor": [lambda input_ids, scores: scores[:, :5]]}, r"returned float32 \(1, 5\)"),
    ({"prefix_allowed_tokens_fn": [1]}, "must be callable"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_refusals_come_before_compiling(options, message, pair_of_models):
    _, mine = pair_of_models
    with counted_compilations() as compiled, pytest.raises(ValueError, match=message):
        mine.generate([[1, 2]], **options)
    assert not compiled


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_transition_scores(options, normalize, rng, pair_of_models):
    """The beams are Transformers' own."""
    theirs, mine = pair_of_models
    ids = random_ids(rng, (2, 6))
    options = {**options, **LENGTH, "return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    output = theirs.generate(th(ids), **options)
    beams = output.beam_indices if "num_beams" in options else None
    want = theirs.compute_transition_scores(output.sequences, output.scores, beams, normalize_logits=normalize)
    got = mine.compute_transition_scores(output.sequences, output.scores, beams, normalize_logits=normalize)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    if beams is None:
        own = mine.generate(ids, **{**options, "do_sample": None})
        got = mine.compute_transition_scores(own.sequences, own.scores, normalize_logits=normalize)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings(HOST)
@pytest.mark.parametrize("processors", [None, [by_numpy]], ids=["compiled", "host"])
def test_attentions_and_hidden_states(processors, rng, pair_of_models):
    theirs, mine = pair_of_models
    ids, mask = random_ids(rng, (2, 7)), padded_mask([7, 4], 7, "left")
    options = {"max_new_tokens": 6, "return_dict_in_generate": True}
    options |= {"output_attentions": True, "output_hidden_states": True}
    other = None if processors is None else [by_torch]
    want = theirs.generate(th(ids), attention_mask=th(mask), logits_processor=other, do_sample=False, **options)
    got = mine.generate(ids, attention_mask=mask, logits_processor=processors, **options)
    np.testing.assert_array_equal(got.sequences, want.sequences)
    for name in ("attentions", "hidden_states"):
        assert len(got[name]) == len(want[name]) == 6
        for ours, reference in zip(got[name], want[name], strict=True):
            for layer, layer_reference in zip(ours, reference, strict=True):
                tokens = layer.shape[1] if name == "hidden_states" else layer.shape[2]
                real = np.broadcast_to(mask.astype(bool) if tokens == 7 else np.ones((2, 1), bool), (2, tokens))
                real = real[..., None] if name == "hidden_states" else real[:, None, :, None]
                close(layer, layer_reference, where=np.broadcast_to(real, layer.shape))


@pytest.mark.filterwarnings("ignore:Passing .no_repeat_ngram_size. with")
@pytest.mark.parametrize("together", [False, True], ids=["alone", "with-ids"])
@pytest.mark.parametrize("length", [{"max_new_tokens": 9, "min_new_tokens": 6}, {"max_length": 20, "min_length": 14}])
def test_prompts_as_embeddings(length, together, rng, pair_of_models):
    theirs, mine = pair_of_models
    embeds, mask = rng.normal(size=(2, 7, 64)).astype(np.float32), padded_mask([7, 4], 7, "left")
    options = {"eos_token_id": EOS, "pad_token_id": 3, "suppress_tokens": [4], "no_repeat_ngram_size": 2, **length}
    ids = {"input_ids": random_ids(rng, (2, 7))} if together else {}
    their_ids = {name: th(value) for name, value in ids.items()}
    want = theirs.generate(inputs_embeds=th(embeds), attention_mask=th(mask), do_sample=False, **their_ids, **options)
    for given in (embeds, jnp.asarray(embeds), th(embeds)):
        got = mine.generate(inputs_embeds=given, attention_mask=mask, **ids, **options)
        np.testing.assert_array_equal(got, want)


def test_embeddings_of_ids_are_those_ids(rng, pair_of_models):
    """Streamed, sampled in several ways, and with a criterion of the host's."""
    _, mine = pair_of_models
    ids = random_ids(rng, (2, 7))
    embeds = np.asarray(mine.params["model"]["embed_tokens"]["weight"])[ids]
    options = {"do_sample": True, "top_k": 0, "seed": 2, "num_return_sequences": 2, "max_new_tokens": 6}
    want = mine.generate(ids, **options)[:, 7:]
    np.testing.assert_array_equal(mine.generate(inputs_embeds=embeds, **options), want)
    np.testing.assert_array_equal(np.stack(list(mine.stream(inputs_embeds=embeds, **options)), axis=1), want)


def test_custom_generate(rng, pair_of_models):
    """A loop of one's own, over all that the call asks for."""
    _, mine = pair_of_models
    ids = random_ids(rng, (2, 7))

    def loop(model, input_ids, attention_mask, logits_processor, stopping_criteria, generation_config, scale=1.0):
        rows = input_ids
        while True:
            logits = model(rows).logits[:, -1] * scale
            for processor in logits_processor:
                logits = processor(rows, logits, None)
            rows = np.concatenate([rows, np.asarray(logits.argmax(-1), np.int32)[:, None]], axis=1)
            if all(criterion(rows, None).all() for criterion in stopping_criteria):
                return rows, generation_config.max_new_tokens

    options = {"max_new_tokens": 3, "suppress_tokens": [5, 6], "repetition_penalty": 1.2}
    got, most = mine.generate(ids, custom_generate=loop, scale=2.0, **options)
    np.testing.assert_array_equal(got, mine.generate(ids, **options))
    assert most == 3
    with pytest.raises(ValueError, match="unknown generation option 'scales'"):
        mine.generate(ids, custom_generate=loop, scales=2.0)
    with pytest.raises(ValueError, match="code of the hub is not run"):
        mine.generate(ids, custom_generate="someone/decoding")


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_rows_of_custom_generate(options, rng, pair_of_models):
    """As many copies of each prompt as Transformers makes."""
    theirs, mine = pair_of_models
    ids = random_ids(rng, (2, 5))

    def shape(model, input_ids, logits_processor, stopping_criteria, generation_config, **rest):
        return tuple(input_ids.shape)

    want = theirs.generate(th(ids), custom_generate=shape, max_new_tokens=3, do_sample=False, **options)
    assert mine.generate(ids, custom_generate=shape, max_new_tokens=3, **options) == want


@pytest.mark.parametrize("option", [{"encoder_repetition_penalty": 3.0}, {"encoder_no_repeat_ngram_size": 1}])
def test_encoder_options_do_not_see_embeddings(option, rng, pair_of_models):
    theirs, mine = pair_of_models
    ids = random_ids(rng, (2, 6))
    embeds = np.asarray(mine.params["model"]["embed_tokens"]["weight"])[ids]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = theirs.generate(th(ids), inputs_embeds=th(embeds), max_new_tokens=8, do_sample=False, **option)
    with pytest.warns(UserWarning, match="beside inputs_embeds they do nothing"):
        np.testing.assert_array_equal(mine.generate(ids, inputs_embeds=embeds, max_new_tokens=8, **option), want)


def test_the_default_length_of_embeddings_counts_new_tokens(rng, pair_of_models):
    """Up to max_position_embeddings, 128 here."""
    theirs, mine = pair_of_models
    embeds = rng.normal(size=(1, 120, 64)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = theirs.generate(inputs_embeds=th(embeds), do_sample=False)
        got = mine.generate(inputs_embeds=embeds)
    np.testing.assert_array_equal(got, want)


EMBEDS = np.zeros((1, 2, 64), np.float32)
BAD_EMBEDS = [
    ({"inputs_embeds": EMBEDS[0]}, r"shape \(2, 64\)"),
    ({"inputs_embeds": EMBEDS[..., :9]}, "expected .batch, tokens, 64."),
    ({"inputs_embeds": EMBEDS, "input_ids": [[1, 2, 3]]}, "they are the same"),
    ({"inputs_embeds": EMBEDS, "attention_mask": [[1]]}, "attention_mask has shape"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_EMBEDS, ids=[message for _, message in BAD_EMBEDS])
def test_embeddings_that_do_not_fit(arguments, message, pair_of_models):
    _, mine = pair_of_models
    with counted_compilations() as compiled, pytest.raises(ValueError, match=message):
        mine.generate(**arguments)
    assert not compiled


def test_synced_gpus_changes_nothing(rng, pair_of_models):
    _, mine = pair_of_models
    ids = random_ids(rng, (2, 7))
    want = mine.generate(ids, max_new_tokens=3)
    np.testing.assert_array_equal(mine.generate(ids, max_new_tokens=3, synced_gpus=True), want)
