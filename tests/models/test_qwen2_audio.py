"""Qwen2-Audio equals Transformers': encoder, projector, merged embeddings, logits, loss, gradients."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flaxqwen.cache import grow_cache
from flaxqwen.config import Qwen2AudioConfig
from flaxqwen.convert import to_path
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.model import Model
from flaxqwen.models.audio_inputs import check_audio_tokens, expand_audio_tokens, tokens_of
from flaxqwen.models.qwen2_audio import Qwen2AudioEncoder, Qwen2AudioForConditionalGeneration, Qwen2AudioModel
from tests.reference import close, params_of, random_ids, th, tiny, torch

FRAMES, BINS, AUDIO = 120, 8, 300
CLIPS = ((2,), (0, 1, 3), (3, 0, 2, 1))  # clips in each row


def config_dict(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Qwen2-Audio, whose clips have at most 120 frames."""
    audio = {
        "model_type": "qwen2_audio_encoder", "num_mel_bins": BINS, "encoder_layers": 2, "encoder_attention_heads": 4,
        "encoder_ffn_dim": 96, "d_model": 64, "max_source_positions": FRAMES // 2,
    }  # fmt: skip
    text = tiny(max_position_embeddings=512)
    return {"model_type": "qwen2_audio", "audio_config": audio | changes, "text_config": text,
            "audio_token_index": AUDIO, "ignore_index": -100}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    """(transformers model, our module, params); one for all files that import this."""
    return make_models()


@cache
def make_models():
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2AudioConfig(**{k: v for k, v in config_dict().items() if k != "model_type"})
    config._attn_implementation = "eager"
    theirs = transformers.Qwen2AudioForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.12 if parameter.ndim > 1 else 0.5))
    module = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig.from_dict(config_dict()))
    theirs.config.tie_word_embeddings = False
    return theirs, module, params_of(theirs)


def older_prompt(rng: np.random.Generator, clips: tuple[int, ...], side: str) -> dict[str, np.ndarray]:
    """Rows of 12 tokens or fewer, with one audio token for each of their clips, and clips of 5 to 120 frames."""
    ids = random_ids(rng, (len(clips), 12), AUDIO)
    mask = np.ones_like(ids)
    for row, count in enumerate(clips):
        start, stop = (2 * row, 12) if side == "left" else (0, 12 - 2 * row)
        mask[row], mask[row, start:stop] = 0, 1
        # Never side by side: Transformers takes those for a new prompt.
        ids[row, start + 1 + 2 * rng.choice((stop - start - 1) // 2, count, replace=False)] = AUDIO
    total = sum(clips)
    features = rng.standard_normal((total, BINS, FRAMES)).astype(np.float32)
    lengths = rng.integers(5, FRAMES + 1, total)
    lengths[0] = FRAMES
    frame_mask = (np.arange(FRAMES)[None] < lengths[:, None]).astype(np.int32)
    return {
        "input_ids": ids, "attention_mask": mask, "input_features": features, "feature_attention_mask": frame_mask,
    }  # fmt: skip


def random_labels(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """[B, T]; the first token of each row is ignored: on the left it would be predicted from padding."""
    labels = np.where(rng.random(mask.shape) < 0.2, -100, random_ids(rng, mask.shape))
    labels[np.arange(len(mask)), mask.argmax(-1)] = -100
    return labels.astype(np.int32)


def expanded(older: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    prompt = expand_audio_tokens(
        older["input_ids"], older["feature_attention_mask"], AUDIO, older["attention_mask"], older.get("labels")
    )
    return older | {name: value for name, value in prompt._asdict().items() if value is not None}


def theirs_of(model: Any, **inputs: np.ndarray) -> Any:
    with torch.no_grad():
        return model(**{name: th(value) for name, value in inputs.items()})


@partial(jax.jit, static_argnums=0)
def ours_of(module, params, inputs):
    return module.apply({"params": params}, **inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("clips", CLIPS, ids=str)
def test_logits_and_loss(models, rng, clips, side):
    """Older and newer prompts, each as Transformers takes it, and ours of the newer one."""
    theirs, module, params = models
    older = older_prompt(rng, clips, side)
    older["labels"] = random_labels(rng, older["attention_mask"])
    newer = expanded(older)
    check_audio_tokens(newer["input_ids"], newer["feature_attention_mask"], AUDIO)
    ours = ours_of(module, params, newer)
    valid = newer["attention_mask"].astype(bool)
    for inputs in (older, newer):
        wanted = theirs_of(theirs, **inputs)
        np.testing.assert_array_equal(wanted.attention_mask.numpy(), newer["attention_mask"])
        close(ours.logits, wanted.logits, where=valid)
        close(ours.loss, wanted.loss, 1e-6)
    np.testing.assert_array_equal(ours.attention_mask, newer["attention_mask"])


def test_arguments_by_their_place(models, rng):
    """In Transformers' order, where input_features come before the mask; what is there twice is refused."""
    theirs, module, params = models
    model = Model(module, params, module.config, GenerationConfig())
    newer = expanded(older_prompt(rng, CLIPS[2], "left"))
    names = ("input_ids", "input_features", "attention_mask", "feature_attention_mask", "position_ids")
    wanted = theirs_of(theirs, **{name: newer[name] for name in names}).logits
    close(model(*(newer[name] for name in names)).logits, wanted, where=newer["attention_mask"].astype(bool))
    text = random_ids(rng, (2, 7), AUDIO)
    close(model(text, None, np.ones_like(text)).logits, theirs_of(theirs, input_ids=text).logits)
    with pytest.raises(TypeError, match="got input_ids twice"):
        model(text, input_ids=text)
    with pytest.raises(TypeError, match="8 arguments have no name; give those after inputs_embeds by name"):
        model(*[text] * 8)


def test_another_number_of_audio_tokens_is_nan_in_a_program(models, rng):
    """Where it cannot be an error: an older prompt, and a clip that is missing."""
    _, module, params = models
    older = older_prompt(rng, CLIPS[2], "left")
    newer = expanded(older)
    assert np.isfinite(ours_of(module, params, newer).logits).all()
    missing = newer | {name: newer[name][1:] for name in ("input_features", "feature_attention_mask")}
    for inputs in (older, missing):
        assert np.isnan(ours_of(module, params, inputs).logits).all()


def test_a_mask_of_frames_may_be_of_floats(models, rng):
    _, module, params = models
    newer = expanded(older_prompt(rng, CLIPS[2], "left"))
    narrow = newer | {"feature_attention_mask": newer["feature_attention_mask"].astype(np.float32)}
    np.testing.assert_array_equal(ours_of(module, params, narrow).logits, ours_of(module, params, newer).logits)


def test_a_first_token_predicted_from_padding(models, rng):
    """Of rows padded on the left, Transformers counts the loss of the first token too, which sees every slot alike."""
    theirs, module, params = models
    inputs = expanded(older_prompt(rng, CLIPS[2], "left"))
    inputs["labels"] = np.where(inputs["attention_mask"] == 0, -100, random_ids(rng, inputs["input_ids"].shape))
    inputs["labels"] = inputs["labels"].astype(np.int32)
    close(ours_of(module, params, inputs).loss, theirs_of(theirs, **inputs).loss, 1e-6)


def test_encoder_projector_and_merged_embeddings(models, rng):
    theirs, module, params = models
    inputs = expanded(older_prompt(rng, CLIPS[2], "left"))
    features, frames = inputs["input_features"], inputs["feature_attention_mask"]
    positions = (frames.sum(-1) - 1) // 2 + 1
    is_audio = np.arange(FRAMES // 2) < positions[:, None]
    additive = np.where(is_audio, 0, np.finfo(np.float32).min)[:, None, None].astype(np.float32)
    additive = np.broadcast_to(additive, (len(frames), 1, FRAMES // 2, FRAMES // 2))
    valid = np.arange(FRAMES // 4) < tokens_of(frames)[:, None]
    tower, inner = theirs.model.audio_tower, theirs.model
    with torch.no_grad():
        encoded = tower(th(features), attention_mask=th(additive)).last_hidden_state
        projected = inner.multi_modal_projector(encoded)
        embeds = inner.get_input_embeddings()(th(inputs["input_ids"]))
        embeds[th(inputs["input_ids"]) == AUDIO] = projected[torch.tensor(valid)]
    encoder = Qwen2AudioEncoder(module.config.audio_config)
    own = params["model"]["audio_tower"]
    for mask in (is_audio, additive, additive == 0):
        output = ours_of(encoder, own, {"input_features": features, "attention_mask": mask})
        close(output.last_hidden_state, encoded, where=valid)
    run = jax.jit(partial(encoder.apply, {"params": own}, output_attentions=True, output_hidden_states=True))
    whole = run(features)
    with torch.no_grad():
        wanted = tower(th(features), output_attentions=True, output_hidden_states=True)
    close(whole.last_hidden_state, wanted.last_hidden_state)
    assert list(whole) == list(wanted)
    for kind in ("hidden_states", "attentions"):
        assert len(whole[kind]) == len(wanted[kind]) == 2 + (kind == "hidden_states")
        for found, reference in zip(whole[kind], wanted[kind], strict=True):
            close(found, reference)
    model = Qwen2AudioModel(module.config)
    apply = jax.jit(partial(model.apply, {"params": params["model"]}), static_argnames=("method", "positions"))
    ours = apply(features, frames, method="encode")
    close(ours, projected, where=valid)
    # As many positions as the clips but the first, which is of full length, take, and one: what is audio is the same.
    count = min(int(positions[1:].max()) + 1, FRAMES // 2)
    short = apply(features[1:], frames[1:], positions=count, method="encode")
    assert short.shape[1] == count // 2
    close(short, projected[1:, : count // 2], where=valid[1:, : count // 2])
    merged = apply(inputs["input_ids"], ours, frames, method="merge")
    close(merged, embeds)


def test_gradients(models, rng):
    theirs, module, params = models
    inputs = expanded(older_prompt(rng, CLIPS[1], "left"))
    inputs["labels"] = random_labels(rng, inputs["attention_mask"])
    theirs.zero_grad()
    theirs(**{name: th(value) for name, value in inputs.items()}).loss.backward()

    @jax.jit
    def gradient(params):
        return jax.grad(lambda params: module.apply({"params": params}, **inputs).loss)(params)

    ours = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(gradient(params))}
    table = ours.pop("['model']['audio_tower']['embed_positions']['weight']")
    assert not np.any(table)  # fixed
    wanted: dict[str, Any] = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            wanted["".join(f"[{key!r}]" for key in to_path(name))] = parameter.grad
    assert ours.keys() == wanted.keys()
    for name, grad in wanted.items():
        close(ours[name], grad, 1e-4)


def test_steps_with_a_cache(models, rng):
    """The prompt with its audio, then a token: what the tower heard stays in the cache; logits of the last position."""
    _, module, params = models
    inputs = expanded(older_prompt(rng, CLIPS[2], "left"))
    extra = random_ids(rng, (len(CLIPS[2]), 1), AUDIO)
    whole = inputs | {
        "input_ids": np.concatenate([inputs["input_ids"], extra], 1),
        "attention_mask": np.pad(inputs["attention_mask"], ((0, 0), (0, 1)), constant_values=1),
        "position_ids": np.concatenate([inputs["position_ids"], inputs["position_ids"][:, -1:] + 1], 1),
    }
    wanted = theirs_of(models[0], **whole).logits[:, -1:]
    first = jax.jit(partial(module.apply, {"params": params}, logits_to_keep=1))(**inputs)
    assert first.logits.shape[1] == 1
    close(first.logits, theirs_of(models[0], **inputs).logits[:, -1:])
    cache = grow_cache(first.past_key_values, capacity=first.past_key_values.capacity + 8)
    step = jax.jit(partial(module.apply, {"params": params}))(
        extra, attention_mask=whole["attention_mask"],
        position_ids=whole["position_ids"][:, -1:], past_key_values=cache,
    )  # fmt: skip
    close(step.logits, wanted)


def test_the_mask_that_is_given_comes_back(models, rng):
    """By the model's call, whose cache is wider; and labels after a cache are hidden by their own part of it."""
    _, module, params = models
    model = Model(module, params, module.config, GenerationConfig())
    inputs = expanded(older_prompt(rng, CLIPS[2], "left"))
    first = model(**inputs, return_dict=False)
    assert np.array_equal(first[-1], inputs["attention_mask"])
    ids, labels = (random_ids(rng, (len(CLIPS[2]), 3), AUDIO) for _ in range(2))
    mask = np.pad(inputs["attention_mask"], ((0, 0), (0, 3)), constant_values=1)
    mask[0, -1] = mask[2, -2] = 0
    output = model(ids, attention_mask=mask, past_key_values=model(**inputs).past_key_values, labels=labels)
    assert np.array_equal(output.attention_mask, mask)
    log_probs = np.asarray(jax.nn.log_softmax(output.logits[:, :-1]), np.float64)
    picked = np.take_along_axis(log_probs, labels[:, 1:, None], axis=-1)[..., 0]
    assert abs(float(output.loss) + picked[mask[:, -2:] != 0].mean()) <= 1e-5 * abs(float(output.loss))


def test_counts_are_transformers(models):
    theirs, module, params = models
    model = Model(module, params, module.config, GenerationConfig())
    for exclude in (False, True):
        for trainable in (False, True):
            assert model.num_parameters(trainable, exclude) == theirs.num_parameters(trainable, exclude)


def test_real_inputs(shared):
    """Of the official repository's demo: prompts of one token a clip, and clips of 9 s and 25 s."""
    for name, frames in (("official_repo_tensordata", 900), ("official_repo_tensordata_1", 2500)):
        inputs = load_file(shared / f"data/qwen2_audio_inputs/{name}.safetensors")
        older, mask = inputs["input_ids"], inputs["feature_attention_mask"]
        assert mask.sum(-1).tolist() == [frames]
        prompt = expand_audio_tokens(older, mask, 151646, inputs["attention_mask"])
        check_audio_tokens(prompt.input_ids, mask, 151646)
        assert prompt.input_ids.shape[1] == older.shape[1] - 1 + frames // 4
        assert [i for i in prompt.input_ids[0] if i != 151646] == [i for i in older[0] if i != 151646]


def test_bad_input(models, rng):
    _, module, params = models
    older = older_prompt(rng, (2, 1), "left")
    frames = older["feature_attention_mask"]
    total = int(tokens_of(frames).sum())
    with pytest.raises(ValueError, match=rf"3 audio tokens \(300\), but the 3 clips take {total}: expand"):
        check_audio_tokens(older["input_ids"], frames, AUDIO)
    with pytest.raises(ValueError, match=r"3 audio tokens \(300\), expected one for each of the 2 clips"):
        expand_audio_tokens(older["input_ids"], frames[:2], AUDIO)
    with pytest.raises(ValueError, match="padding on both sides"):
        expand_audio_tokens([[1, AUDIO, 1, 1], [1, 1, AUDIO, 1]], frames[:2], AUDIO, [[0, 1, 1, 1], [1, 1, 1, 0]])
    with pytest.raises(ValueError, match="hides an audio token"):
        expand_audio_tokens([[AUDIO, 1]], frames[:1], AUDIO, [[0, 1]])
    apply = partial(module.apply, {"params": params})
    with pytest.raises(ValueError, match="needs feature_attention_mask"):
        apply(older["input_ids"], older["input_features"])
    with pytest.raises(ValueError, match="needs input_ids"):
        apply(None, older["input_features"], feature_attention_mask=frames, inputs_embeds=jnp.zeros((2, 5, 64)))
    with pytest.raises(ValueError, match="pad or cut every clip to 120 frames"):
        apply(older["input_ids"], older["input_features"][..., :100], feature_attention_mask=frames)
