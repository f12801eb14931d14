"""Tiny models on disk for the command line, made without torch, and a way to run it in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, Qwen2AudioConfig, Qwen2Config
from flaxqwen.cli import main

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_OF_TURN = 258
GEOMETRY = {
    "vocab_size": 264,  # a few more than the tokenizer has, as in Qwen's own models
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # the usual 0.02 leaves logits nearly equal
}
SENTENCE = "Hé 🦜!"  # no two bytes are equal


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def call(*args: Any) -> Result:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return call


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2, one line on stderr which has the words, and nothing on stdout."""
    assert (result.code, result.out) == (2, ""), result
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 model in PyTorch's format, with a byte-level tokenizer. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("random")
    config = Qwen2Config(**GEOMETRY, dtype="float32", eos_token_id=END_OF_TURN)
    save(AutoModelForCausalLM.from_config(config, seed=1), folder)
    return folder


@pytest.fixture(scope="session")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers every prompt with SENTENCE and the end of its turn."""
    folder = tmp_path_factory.mktemp("sentence")
    config = Qwen2Config(**GEOMETRY, dtype="float32", eos_token_id=END_OF_TURN)
    model = AutoModelForCausalLM.from_config(config)
    params = jax.tree.map(jnp.zeros_like, model.params)
    # With zeros in every layer, logits are a table of the last token: each byte of the sentence has an axis of its own.
    write_tokenizer(folder)
    tokens = [*encode(folder, SENTENCE), END_OF_TURN]
    embedding, head = np.zeros((2, *params["lm_head"]["weight"].shape), np.float32)
    embedding[:, 0] = 1
    for axis, (token, following) in enumerate(pairwise(tokens), start=1):
        embedding[token] = np.eye(config.hidden_size)[axis]
        head[following, axis] = 1
    head[tokens[0], 0] = 1
    params["model"]["norm"]["weight"] = jnp.ones(config.hidden_size)
    params["model"]["embed_tokens"]["weight"] = jnp.asarray(embedding)
    params["lm_head"]["weight"] = jnp.asarray(head)
    save(dataclasses.replace(model, params=params), folder)
    return folder


@pytest.fixture
def copied(random_model: Path, tmp_path: Path) -> Path:
    """A copy of the random model, to be spoilt."""
    return Path(shutil.copytree(random_model, tmp_path / "model"))


def save(model: Any, folder: Path) -> None:
    """Write a model in PyTorch's format, with the tokenizer."""
    model = dataclasses.replace(model, generation_config=GenerationConfig(eos_token_id=END_OF_TURN))
    model.save_pretrained(folder, to="pytorch")
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one token per byte and Qwen's special tokens, 256 to 258."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def encode(folder: Path, text: str) -> list[int]:
    """Token ids of a text, by the tokenizers library alone."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def save_audio_model(path: Path, shared: Path) -> Path:
    """A tiny random Qwen2-Audio in PyTorch's format, float32, with the real tokenizer and a context of 2,048 tokens."""
    encoder = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16}
    text = {
        "vocab_size": 151936, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048, "initializer_range": 0.3,
    }  # fmt: skip
    config = {"model_type": "qwen2_audio", "audio_config": encoder, "text_config": text, "dtype": "float32"}
    model = AutoModelForSeq2SeqLM.from_config(Qwen2AudioConfig.from_dict(config))
    model.save_pretrained(path, to="pytorch")
    GenerationConfig(do_sample=False, eos_token_id=151645, pad_token_id=151643).save_pretrained(path)
    for file in (shared / "data/tokenizer/qwen2-audio-minimal").iterdir():
        shutil.copyfile(file, path / file.name)
    shutil.copyfile(shared / "data/configs/Qwen2-Audio-7B/preprocessor_config.json", path / "preprocessor_config.json")
    return path
