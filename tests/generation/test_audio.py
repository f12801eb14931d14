"""generate() of Qwen2-Audio equals Transformers'; the encoder runs once a call, over the clips that are new."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, GenerationConfig, Model, Qwen2Config
from flaxqwen.generation import audio
from flaxqwen.models.audio_inputs import tokens_of
from tests.generation.test_beam import smallest_gap
from tests.models.test_qwen2_audio import AUDIO, CLIPS, expanded, models, older_prompt  # noqa: F401  # models: a fixture
from tests.reference import counted_compilations, random_ids, th, tiny, torch

# No end of sequence, and no audio token of the model's own, which would have to be heard in the next turn.
PLAIN = {"do_sample": False, "suppress_tokens": [AUDIO], "pad_token_id": 0}
LONG = PLAIN | {"max_new_tokens": 64}
SHORT = PLAIN | {"max_new_tokens": 12}
WIDTH = 100  # three clips of 30 tokens and the text


@pytest.fixture(scope="module")
def model(models) -> Model:  # noqa: F811  # pytest hands it in by its name
    _, module, params = models
    return Model(module, params, module.config, GenerationConfig())


@pytest.fixture
def prompts(rng) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Four rows with 3, 0, 2 and 1 clips, padded on the left: as older and as newer prompts."""
    older = older_prompt(rng, CLIPS[2], "left")
    return older, newer_prompt(older)


def newer_prompt(older: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Expanded, and padded to one width: one program for all."""
    newer = expanded(older)
    for name in ("input_ids", "attention_mask"):
        newer[name] = np.pad(newer[name], ((0, 0), (WIDTH - newer[name].shape[1], 0)))
    del newer["position_ids"]
    return newer


def theirs_of(models: Any, inputs: dict[str, np.ndarray], **options: Any) -> np.ndarray:  # noqa: F811  # pytest hands it in by its name
    with torch.no_grad():
        tokens = models[0].generate(**{name: th(value) for name, value in inputs.items()}, **options)
    return tokens.numpy()


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many clips each run of the encoder was of."""
    counts: list[int] = []
    program = audio.encode_clips

    def counting(module: Any, variables: Any, features: Any, frames: Any, count: Any, **static: Any) -> Any:
        counts.append(int(count))
        return program(module, variables, features, frames, count, **static)

    monkeypatch.setattr(audio, "encode_clips", counting)
    return counts


def test_greedy_tokens(models, model, prompts, rng, encoded):  # noqa: F811  # pytest hands it in by its name
    """64 of each row, as theirs, from older and newer prompts; other clips and lengths compile nothing."""
    older, newer = prompts
    wanted = theirs_of(models, newer, **LONG)
    np.testing.assert_array_equal(model.generate(**newer, **LONG), wanted)
    again = model.generate(**older, **LONG)
    np.testing.assert_array_equal(again[:, :12], older["input_ids"])
    np.testing.assert_array_equal(again[:, 12:], wanted[:, -64:])
    assert encoded == [6, 6]  # once a call
    with counted_compilations() as compiled:
        other = newer_prompt(older_prompt(rng, (1, 2, 1, 1), "left"))
        found = model.generate(**other, **SHORT)
    assert not compiled
    np.testing.assert_array_equal(found, theirs_of(models, other, **SHORT))


def test_a_row_alone(model, prompts):
    """Its tokens do not depend on the other rows' clips, nor on padding."""
    older, newer = prompts
    clips = slice(3, 5)  # of the third row
    alone = {name: older[name][clips] for name in ("input_features", "feature_attention_mask")}
    start = older["attention_mask"][2].argmax()
    alone |= {name: older[name][2:3, start:] for name in ("input_ids", "attention_mask")}
    wanted = model.generate(**newer, **SHORT)[2, -12:]
    np.testing.assert_array_equal(model.generate(**alone, **SHORT)[0, -12:], wanted)


def test_custom_generate(model, prompts, encoded):
    """A loop of one's own hears the clips of each row, as often as the row is repeated; nothing else encodes them."""
    older, newer = prompts

    def loop(model, input_ids, attention_mask, input_features, feature_attention_mask, logits_processor):
        heard = {"input_features": input_features, "feature_attention_mask": feature_attention_mask}
        logits = model(input_ids, attention_mask=attention_mask, **heard).logits[:, -1]
        for processor in logits_processor:
            logits = processor(input_ids, logits, None)
        return np.asarray(logits.argmax(-1))

    wanted = model.generate(**newer, **PLAIN, max_new_tokens=1)[:, -1]
    del encoded[:]
    for inputs in (older, newer):
        for copies in (1, 2):
            options = {"custom_generate": loop, "num_return_sequences": copies, "max_new_tokens": 1, "pad_token_id": 0}
            found = model.generate(**inputs, **options, suppress_tokens=[AUDIO], do_sample=copies > 1, top_k=0)
            np.testing.assert_array_equal(found, np.repeat(wanted, copies))
    assert not encoded


def heard_by_theirs(models: Any, inputs: dict[str, np.ndarray]) -> Any:  # noqa: F811  # pytest hands it in by its name
    """The prompts as embeddings [B, T, D], by Transformers' modules."""
    captured = []
    hook = models[0].model.language_model.register_forward_pre_hook(
        lambda module, arguments, keywords: captured.append(keywords["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        models[0](**{name: th(value) for name, value in inputs.items()})
    hook.remove()
    return captured[0]


def test_beams(models, model, rng, encoded):  # noqa: F811  # pytest hands it in by its name
    """Theirs are of the merged embeddings: given features, Transformers repeats each clip in place of each row's clips,
    so that beams of rows with several clips hear the wrong ones."""
    options = SHORT | {"num_beams": 3, "num_return_sequences": 2}
    scores = {"return_dict_in_generate": True, "output_scores": True}
    gaps = [0.0]
    while min(gaps) < 2e-5:  # ties within rounding do not count
        older = older_prompt(rng, CLIPS[2], "left")
        newer = newer_prompt(older)
        embeds = heard_by_theirs(models, newer)
        gaps = smallest_gap(models[0])
        wanted = models[0].generate(
            inputs_embeds=embeds, attention_mask=th(newer["attention_mask"]), **options, **scores
        )
        del models[0]._get_top_k_continuations
    found = model.generate(**newer, **options, **scores)
    np.testing.assert_array_equal(found.sequences[:, WIDTH:], wanted.sequences.numpy())
    np.testing.assert_allclose(found.sequences_scores, wanted.sequences_scores.numpy(), rtol=1e-5)
    again = model.generate(**older, **options)
    np.testing.assert_array_equal(again[:, :12], np.repeat(older["input_ids"], 2, axis=0))
    np.testing.assert_array_equal(again[:, 12:], found.sequences[:, WIDTH:])
    assert encoded == [6, 6]


def test_sampling_and_streaming(model, prompts, encoded):
    """One seed, one text: streamed or not, of older prompts or newer, in chunks; copies of a row hear its clips."""
    older, newer = prompts
    options = SHORT | {"do_sample": True, "temperature": 0.8, "top_k": 50, "seed": 5, "num_return_sequences": 2}
    wanted, greedy = (model.generate(**newer, **chosen)[:, WIDTH:] for chosen in (options, SHORT))
    assert (wanted[::2] != wanted[1::2]).any()
    likeliest = model.generate(**newer, **options | {"top_k": 1})[:, WIDTH:]
    np.testing.assert_array_equal(likeliest, np.repeat(greedy, 2, axis=0))
    np.testing.assert_array_equal(np.stack(list(model.stream(**older, **options)), axis=1), wanted)
    chunked = model.generate(**newer, **options, prefill_chunk_size=16)
    np.testing.assert_array_equal(chunked[:, WIDTH:], wanted)
    assert encoded == [6] * 5


def test_drafts(model, prompts):
    """A draft that cannot hear, and has a smaller vocabulary; the first layer: verified, so the same tokens."""
    _, newer = prompts
    wanted = model.generate(**newer, **SHORT)
    draft = AutoModelForCausalLM.from_config(Qwen2Config.from_dict(tiny(vocab_size=AUDIO + 1, num_hidden_layers=1)))
    for drafting in ({"assistant_model": draft}, {"assistant_early_exit": 1}):
        np.testing.assert_array_equal(model.generate(**newer, **SHORT, **drafting), wanted)


def test_guidance_and_penalties(models, model, prompts, rng):  # noqa: F811  # pytest hands it in by its name
    _, newer = prompts
    options = SHORT | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    np.testing.assert_array_equal(model.generate(**newer, **options), theirs_of(models, newer, **options))
    negative = random_ids(rng, (4, 5), AUDIO)
    wanted = theirs_of(models, newer, **SHORT, guidance_scale=1.5, negative_prompt_ids=th(negative))
    found = model.generate(**newer, **SHORT, guidance_scale=1.5, negative_prompt_ids=negative)
    np.testing.assert_array_equal(found, wanted)


def test_turns(models, model, prompts, rng, encoded):  # noqa: F811  # pytest hands it in by its name
    """A second turn with a clip more runs the encoder over that one; a third without any needs no encoder at all."""
    _, newer = prompts
    options = SHORT | {"return_dict_in_generate": True}
    first = model.generate(**newer, **options)
    more = older_prompt(rng, (0, 0, 0, 1), "right")
    clip = {name: more[name] for name in ("input_features", "feature_attention_mask")}
    count = int(tokens_of(clip["feature_attention_mask"]).sum())
    turn = random_ids(rng, (4, count + 3), AUDIO)
    turn[3, 1 : 1 + count] = AUDIO
    whole = {name: np.concatenate([newer[name], clip[name]]) for name in clip}
    whole["input_ids"] = np.concatenate([first.sequences, turn], axis=1)
    added = whole["input_ids"].shape[1] - newer["attention_mask"].shape[1]
    whole["attention_mask"] = np.pad(newer["attention_mask"], ((0, 0), (0, added)), constant_values=1)
    second = model.generate(**whole, **options, past_key_values=first.past_key_values)
    np.testing.assert_array_equal(second.sequences, theirs_of(models, whole, **SHORT))
    assert encoded == [6, 1]

    ids = np.concatenate([second.sequences, random_ids(rng, (4, 3), AUDIO)], axis=1)
    last = whole | {"input_ids": ids}
    last["attention_mask"] = np.pad(whole["attention_mask"], ((0, 0), (0, 15)), constant_values=1)
    wanted = theirs_of(models, last, **SHORT)
    deaf = {name: value for name, value in model.params["model"].items() if name == "language_model"}
    mute = dataclasses.replace(model, params=model.params | {"model": deaf})
    short = {name: last[name] for name in ("input_ids", "attention_mask")}
    np.testing.assert_array_equal(mute.generate(**short, **SHORT, past_key_values=second.past_key_values), wanted)
    assert encoded == [6, 1]


def test_bad_input(model, prompts):
    older, newer = prompts
    total = int(tokens_of(older["feature_attention_mask"]).sum())

    def refused(match: str, **changes: Any) -> None:
        inputs = {name: value for name, value in (newer | changes).items() if value is not None}
        with pytest.raises(ValueError, match=match):
            model.generate(**inputs, max_new_tokens=2)

    without = {"input_features": None, "feature_attention_mask": None}
    refused(rf"has {total} audio tokens \({AUDIO}\), but no input_features", **without)
    refused("go together", input_features=None)
    refused("go together", feature_attention_mask=None)
    refused(rf"has 0 audio tokens \({AUDIO}\), but the 6 clips take {total}", input_ids=newer["input_ids"] * 0 + 7)
    refused(rf"has {total} audio tokens \({AUDIO}\), but the 5 clips", **{name: newer[name][:5] for name in without})
    broken = newer["input_features"].copy()
    broken[0, 0, 0] = np.nan
    refused("not finite", input_features=broken)
    refused(r"shape \(6, 8, 100\); expected \[clips, 8 mel bins, 120 frames\]", input_features=broken[..., :100])
    refused("from the first on", feature_attention_mask=newer["feature_attention_mask"][:, ::-1])
    long = {"input_ids": np.array([[AUDIO, 7] * 20]), "attention_mask": None}
    long |= {"input_features": np.zeros((20, 8, 120)), "feature_attention_mask": np.ones((20, 120), int)}
    refused("the prompt has 620 tokens, the model's context is 512", **long)
    text = AutoModelForCausalLM.from_config(Qwen2Config.from_dict(tiny()))
    with pytest.raises(ValueError, match="input_features are for Qwen2-Audio; the model is Qwen2ForCausalLM"):
        text.generate(**newer)
    first = model.generate(**older, **SHORT, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=2)


def test_torch_inputs_of_any_kind(model, prompts):
    """bfloat16 tensors, as of BatchFeature.to(torch.bfloat16), and those of a graph."""
    _, newer = prompts
    rounded = th(newer["input_features"]).bfloat16()
    given = {name: th(value) for name, value in newer.items()} | {"input_features": rounded}
    wanted = model.generate(**newer | {"input_features": rounded.float().numpy()}, **SHORT)
    for changed in (
        {"attention_mask": given["attention_mask"].bfloat16()},
        {"feature_attention_mask": given["feature_attention_mask"].bfloat16()},
        {"input_features": rounded.float().requires_grad_()},
    ):
        np.testing.assert_array_equal(model.generate(**given | changed, **SHORT), wanted)
