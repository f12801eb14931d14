"""The parity report finds no fault where there is none, and names the module of the one that is put in."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from flaxqwen import AutoModelForCausalLM, parity
from flaxqwen.convert import convert, to_path
from flaxqwen.parity_report import Comparison, GreedyDifference, Report
from tests.reference import RELATIVE, random_ids, th, tiny, torch, torch_model

STEPS = 8
LENGTHS = (9, 26, 14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of Transformers without a tokenizer, whose generation config would spoil greedy parity."""
    path = tmp_path_factory.mktemp("parity") / "model"
    model = torch_model("Qwen2ForCausalLM", tiny(vocab_size=507))
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.eos_token_id = list(range(400))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    seed = int(os.environ.get("FLAXQWEN_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"FLAXQWEN_TEST_SEED={seed}")
    rng = np.random.default_rng(seed)
    return [random_ids(rng, (length,)).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def f32(folder: Path, prompts: list[list[int]]) -> Report:
    return parity.compare(folder, prompts=prompts, steps=STEPS)


@pytest.fixture(scope="module")
def bf16(folder: Path) -> Report:
    return parity.compare(folder, dtype="bfloat16", steps=STEPS)


@pytest.fixture(scope="module")
def trace(folder: Path, prompts: list[list[int]]) -> parity.Trace:
    batch = parity.make_batch([parity.Prompt(tuple(prompt)) for prompt in prompts])
    return parity.trace_torch(folder, "float32", batch, STEPS)


def change_ours(monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> None:
    """Let our side load the checkpoint with one tensor changed."""
    load = AutoModelForCausalLM.from_pretrained

    def loaded(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        params = jax.tree.map(lambda a: a, model.params)
        *modules, leaf = to_path(name)
        node = params
        for module in modules:
            node = node[module]
        node[leaf] = change(node[leaf])
        return dataclasses.replace(model, params=params)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


def rendered(report: Report, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(report.table())
    return console.file.getvalue()


def test_float32_passes(f32: Report) -> None:
    assert f32.passed
    assert f32.first_divergent is None
    assert f32.pytorch is None
    assert f32.ours.first_difference is None
    assert f32.ours.top1_agreement == 1
    assert len(f32.ours.kl) == sum(LENGTHS)  # padding does not count
    assert 0 <= f32.ours.kl_mean <= f32.ours.kl_max < 1e-8
    names = [m.name for m in f32.ours.modules]
    assert names == [
        "model.embed_tokens",
        *(f"model.layers.{i}{part}" for i in range(2) for part in (".self_attn", ".mlp", "")),
        "model.norm",
        "logits",
    ]
    assert all(m.max_rel <= RELATIVE and m.rms_abs <= m.max_abs for m in f32.ours.modules)
    assert f32.ours.modules[-1].max_abs > 0  # two implementations: equal to the last bit would be no comparison


def test_the_generation_config_of_the_checkpoint_does_not_count(prompts: list[list[int]], trace: parity.Trace) -> None:
    model = torch_model("Qwen2ForCausalLM", tiny(vocab_size=507))
    for prompt, tokens, margins in zip(prompts, trace.tokens, trace.margins, strict=True):
        ids = list(prompt)
        for token, margin in zip(tokens, margins, strict=True):
            with torch.no_grad():
                best = model(th(np.array([ids], np.int32))).logits[0, -1].topk(2)
            assert token == best.indices[0]
            assert margin == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-4)
            ids.append(int(token))


FAULTS = {
    "model.embed_tokens.weight": "model.embed_tokens",
    "model.layers.1.self_attn.o_proj.weight": "model.layers.1.self_attn",
    "model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp",
    "model.layers.1.post_attention_layernorm.weight": "model.layers.1.mlp",
    "model.norm.weight": "model.norm",
    "lm_head.weight": "logits",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(
    name: str, folder: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_ours(monkeypatch, name, lambda a: a * 1.001)
    report = parity.compare(folder, prompts=prompts, steps=STEPS)
    assert not report.passed
    assert report.first_divergent == FAULTS[name]
    assert f"look at {FAULTS[name]}" in rendered(report)
    assert "FAIL" in rendered(report)


def test_errors_are_those_of_the_fault(folder: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    change_ours(monkeypatch, "lm_head.weight", lambda a: a * 1.25)
    report = parity.compare(folder, prompts=prompts, steps=STEPS)
    logits = report.ours.modules[-1]
    assert logits.max_rel == pytest.approx(0.25, rel=1e-4)
    assert logits.rms_rel == pytest.approx(0.25, rel=1e-4)
    model = torch_model("Qwen2ForCausalLM", tiny(vocab_size=507))
    with torch.no_grad():
        wanted = torch.cat([model(th(np.array([prompt], np.int32))).logits[0] for prompt in prompts]).double()
    assert logits.max_abs == pytest.approx(0.25 * float(wanted.abs().max()), rel=1e-4)
    assert logits.rms_abs == pytest.approx(0.25 * float(wanted.square().mean().sqrt()), rel=1e-4)
    log_p, log_q = (scale * wanted for scale in (1, 1.25))
    kl = torch.nn.functional.kl_div(
        log_q.log_softmax(-1), log_p.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    np.testing.assert_allclose(report.ours.kl, kl.numpy(), rtol=1e-4, atol=1e-9)
    assert report.ours.top1_agreement == 1


def test_greedy_differences(
    folder: Path, prompts: list[list[int]], trace: parity.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = int(trace.tokens[1, 4])
    b = next(token for token in range(507) if token not in trace.tokens)  # it takes a's place wherever a comes
    change_ours(monkeypatch, "lm_head.weight", lambda w: w.at[np.array([a, b])].set(w[np.array([b, a])]))
    report = parity.compare(folder, prompts=prompts, steps=STEPS)
    expected = []
    for prompt, tokens in enumerate(trace.tokens.tolist()):
        if a in tokens:
            step = tokens.index(a)
            expected.append(GreedyDifference(prompt, step, a, b, float(trace.margins[prompt, step])))
    assert report.ours.differences == tuple(expected)
    assert report.ours.first_difference == min(expected, key=lambda d: d.step)
    assert f"{b} for {a}" in rendered(report)


def test_a_difference_within_the_logit_error_is_excused(f32: Report) -> None:
    error = f32.ours.modules[-1].max_abs

    def with_margin(margin: float) -> Report:
        differences = (GreedyDifference(0, 3, 1, 2, error / 2), GreedyDifference(1, 5, 3, 4, margin))
        return dataclasses.replace(f32, ours=dataclasses.replace(f32.ours, differences=differences))

    assert with_margin(0.9 * error).passed
    assert not with_margin(1.1 * error).passed


def test_bfloat16_is_measured_beside_pytorch(bf16: Report) -> None:
    assert bf16.passed
    assert bf16.pytorch is not None
    (check,) = bf16.checks
    assert check.value == bf16.ours.kl_mean > 1e-7  # bfloat16 rounds: a report without error compared f32 with f32
    assert check.limit == pytest.approx(1.2 * bf16.pytorch.kl_mean)
    assert bf16.pytorch.kl_mean > 1e-7
    assert "PyTorch's" in rendered(bf16)
    assert "PyTorch bfloat16: KL mean" in rendered(bf16)


def test_a_fault_in_bfloat16_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_ours(monkeypatch, "model.layers.1.mlp.down_proj.weight", lambda a: a * 1.1)
    report = parity.compare(folder, dtype="bfloat16", steps=STEPS)
    assert not report.passed
    assert report.first_divergent == "model.layers.1.mlp"


def test_random_prompts_without_a_tokenizer(bf16: Report) -> None:
    assert [len(prompt.ids) for prompt in bf16.prompts] == list(parity.RANDOM_LENGTHS)
    assert all(prompt.text is None for prompt in bf16.prompts)


@pytest.mark.parametrize("layout", ["checkpoint", "linen"])
def test_flax_folders_compare_as_their_source(
    layout: Any, folder: Path, prompts: list[list[int]], f32: Report, tmp_path: Path
) -> None:
    convert(folder, tmp_path / "flax", to="flax", layout=layout)
    report = parity.compare(tmp_path / "flax", prompts=prompts, steps=STEPS)
    assert report.passed
    assert [m.name for m in report.ours.modules] == [m.name for m in f32.ours.modules]
    assert report.ours.modules[-1].max_abs == pytest.approx(f32.ours.modules[-1].max_abs, rel=1e-3)


def test_tied_sliding_and_rope_scaled(tmp_path: Path, prompts: list[list[int]]) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    sliding = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    config = tiny(tie_word_embeddings=True, rope_parameters=rope, return_dict=False, **sliding)
    torch_model("Qwen2ForCausalLM", config).save_pretrained(tmp_path)
    report = parity.compare(tmp_path, prompts=prompts, steps=STEPS)
    assert report.passed, rendered(report)


def test_texts_are_tokenized(folder: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mixed = parity.make_prompts(tmp_path, ["ab", [5, 6]], STEPS)
    assert mixed == (parity.Prompt((alphabet["a"], alphabet["b"]), "ab"), parity.Prompt((5, 6)))
    assert [prompt.text for prompt in parity.make_prompts(tmp_path, None, STEPS)] == list(parity.PROMPTS)


def test_real_tokenizer(folder: Path, shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "tokenizer" / "qwen2.5-instruct"
    for path in source.iterdir():
        os.symlink(path, tmp_path / path.name)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 151936}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lengths = [len(prompt.ids) for prompt in parity.make_prompts(tmp_path, None, STEPS)]
    assert len(set(lengths)) == 4  # of different lengths: padding is compared too
    assert sum(lengths) > 150


def test_save(bf16: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib: pip install flaxqwen[plot]")
    from matplotlib import image

    bf16.save(tmp_path / "new" / "report")
    assert sorted(path.name for path in (tmp_path / "new" / "report").iterdir()) == ["parity.png", "report.json"]
    data = json.loads((tmp_path / "new" / "report" / "report.json").read_text())
    assert data == json.loads(json.dumps(bf16.to_dict()))
    assert data["passed"] is True
    assert data["ours"]["kl_mean"] == bf16.ours.kl_mean
    assert data["pytorch"]["modules"][1]["name"] == "model.layers.0.self_attn"
    assert data["checks"][0]["limit"] == bf16.checks[0].limit
    assert data["versions"]["jax"] == jax.__version__
    pixels = image.imread(tmp_path / "new" / "report" / "parity.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 20  # something is drawn


def test_a_failing_write_leaves_the_old_report(f32: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old")

    def full(path: Path, data: bytes) -> int:
        with open(path, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        f32.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_nan_fails_and_is_null_in_json(f32: Report, tmp_path: Path) -> None:
    first, *rest = f32.ours.modules
    nan = [dataclasses.replace(m, max_abs=math.nan, rms_abs=math.nan, max_rel=math.nan, rms_rel=math.nan) for m in rest]
    report = dataclasses.replace(
        f32, ours=Comparison((first, *nan), (math.nan,) * len(f32.ours.kl), math.nan, f32.ours.differences)
    )
    assert not report.passed
    assert report.first_divergent == "model.layers.0.self_attn"
    assert report.to_dict()["ours"]["modules"][-1]["max_abs"] is None
    assert "nan" in rendered(report)
    report.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["ours"]["kl_mean"] is None


def test_without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r'^[^\n]*pip install "flaxqwen\[torch\]"$'):
        parity.compare(folder)


def test_without_matplotlib(f32: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r'^[^\n]*pip install "flaxqwen\[plot\]"$'):
        f32.save(tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16' is not supported by parity"),
        ({"steps": 0}, "steps=0"),
        ({"prompts": []}, "prompts=\\[\\]; expected a list"),
        ({"prompts": "some text"}, "prompts='some text'; expected a list"),
        ({"prompts": ["some text"]}, "no tokenizer"),
        ({"prompts": [[1, 2], []]}, "the prompt is empty"),
        ({"prompts": [[1, 507]]}, "token id 507 is out of the vocabulary"),
        ({"prompts": [[1] * 129]}, "the prompt has 129 tokens"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parity.compare(folder, **options)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        parity.compare(tmp_path / "absent")
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    with pytest.raises(FileNotFoundError, match="no checkpoint in this folder"):
        parity.compare(tmp_path)
