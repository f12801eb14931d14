"""Training runs of adapters: peft and torch's AdamW step by step, and a run that was stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from flaxqwen import AutoModelForCausalLM, LoraConfig, Model
from flaxqwen.cli.train import parse_lora
from flaxqwen.dataset import Batches
from flaxqwen.generation.config import GenerationConfig
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from flaxqwen.trainer import TrainingOptions, train
from flaxqwen.training import make_schedule
from tests.reference import close, pair, random_ids, th, torch, torch_losses

peft = pytest.importorskip("peft", reason="adapters are compared with the peft library: pip install flaxqwen[test]")
for extra in ("grain", "orbax.checkpoint"):
    pytest.importorskip(extra, reason="trains: pip install 'flaxqwen[train]'")

# peft's own, about Transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

STEPS = 20
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
KINDS = {
    "plain": LoraConfig(r=4, lora_alpha=16, target_modules=LINEAR),
    "dora": LoraConfig(
        r=3, lora_alpha=12, target_modules=("q_proj", "up_proj"), use_dora=True, use_rslora=True,
        rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 6},
    ),
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "steps": STEPS, "batch_size": 3, "learning_rate": 5e-3, "warmup_steps": 3, "weight_decay": 0.1, "beta2": 0.98,
    "dtype": "float32", "log_every": 1, "save_every": 1000,
}  # fmt: skip


def make_rows(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of one document each, a third of their labels ignored."""
    ids = random_ids(rng, (10, 12))
    labels = np.where(rng.random(ids.shape) < 0.3, -100, ids).astype(np.int32)
    return {"input_ids": ids, "labels": labels}


def losses_of(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def loss_on(model: Model, rows: dict[str, np.ndarray]) -> float:
    """Of all rows, so that it does not depend on which are in a batch."""
    return float(model(rows["input_ids"], labels=rows["labels"]).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_as_in_peft(kind: str, rng: np.random.Generator, tmp_path: Path):
    """The loss of each step within 1e-4; what is saved peft loads, with our logits; the base stays as it was."""
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, int(rng.integers(1000)))
    base = Model(module, params, module.config, GenerationConfig())
    rows, options = make_rows(rng), TrainingOptions(lora=KINDS[kind], seed=int(rng.integers(1000)), **OPTIONS)
    ids = random_ids(rng, (2, 9))
    before = np.asarray(base(ids).logits)
    base.add_adapter(KINDS[kind], seed=options.seed).save_adapter(tmp_path / "start")
    trained, taken = train(base, rows, tmp_path / "run", options)
    assert taken == STEPS
    start = peft.PeftModel.from_pretrained(theirs, tmp_path / "start", is_trainable=True)
    batches = Batches(rows, options.batch_size, options.accumulate, options.seed)
    schedule = make_schedule(STEPS, options.learning_rate, options.warmup_steps)
    settings = {name: getattr(options, name) for name in ("eps", "weight_decay", "max_grad_norm")}
    betas = (options.beta1, options.beta2)
    expected = torch_losses(start, map(batches.__getitem__, range(STEPS)), schedule, betas=betas, **settings)
    np.testing.assert_allclose(losses_of(tmp_path / "run"), expected, rtol=1e-4)
    assert loss_on(trained, rows) < 0.95 * loss_on(base, rows)
    assert (np.asarray(trained.disable_adapters()(ids).logits) == before).all()
    trained.save_adapter(tmp_path / "trained")
    loaded = peft.PeftModel.from_pretrained(start.unload(), tmp_path / "trained").eval()
    with torch.no_grad():
        want = loaded(input_ids=th(ids)).logits
    close(trained(ids).logits, want)
    assert np.abs(before - want.numpy()).max() > 1e-2 * np.abs(before).max()


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_stopped_run_resumes_bit_for_bit(optim: Any, rng: np.random.Generator, tmp_path: Path):
    """SIGTERM saves and stops; the run that goes on has the adapter and the losses of one that was never stopped."""
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, int(rng.integers(1000)))
    base = Model(module, params, module.config, GenerationConfig())
    rows, options = make_rows(rng), TrainingOptions(lora=KINDS["plain"], optim=optim, **OPTIONS)
    stop = int(rng.integers(2, STEPS - 1))
    whole, _ = train(base, rows, tmp_path / "whole", options)

    def terminate(record: dict[str, Any], steps: int) -> None:
        if record["step"] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    _, taken = train(base, rows, tmp_path / "stopped", options, report=terminate)
    assert taken == stop
    with pytest.raises(FileExistsError, match="--resume"):
        train(base, rows, tmp_path / "stopped", options)
    other = TrainingOptions(lora=KINDS["dora"], **OPTIONS)
    with pytest.raises(ValueError, match="other options"):
        train(base, rows, tmp_path / "stopped", other, resume=True)
    with pytest.raises(ValueError, match="other options or data"):
        train(base, make_rows(rng), tmp_path / "stopped", options, resume=True)
    resumed, taken = train(base, rows, tmp_path / "stopped", options, resume=True)
    assert taken == STEPS
    mine, want = resumed.get_adapter_state_dict(), whole.get_adapter_state_dict()
    assert mine.keys() == want.keys()
    for name in want:
        assert np.asarray(mine[name]).tobytes() == np.asarray(want[name]).tobytes(), name
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")


def test_evaluations_are_logged(rng: np.random.Generator, tmp_path: Path):
    """At their own steps, of all rows, the last batch not full; of all parameters, kept in float32."""
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    model = Model(module, params, module.config, GenerationConfig())
    rows, held_out = make_rows(rng), make_rows(rng)
    changes: dict[str, Any] = {"steps": 7, "log_every": 4, "eval_every": 3}
    trained, _ = train(model, rows, tmp_path, TrainingOptions(**(OPTIONS | changes)), held_out=held_out)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained.params)} == {np.dtype("float32")}
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 4, 6, 7]
    assert ["eval_loss" in record for record in records] == [True, False, True, True]
    loss = loss_on(trained, held_out)
    assert records[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert records[-1]["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)


def test_a_run_that_diverges_is_saved(rng: np.random.Generator, tmp_path: Path):
    """A loss whose exponential is no number."""
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    params["lm_head"]["weight"] *= 3000
    model = Model(module, params, module.config, GenerationConfig())
    changes = {"steps": 1, "lora": KINDS["plain"]}
    train(model, make_rows(rng), tmp_path, TrainingOptions(**(OPTIONS | changes)), held_out=make_rows(rng))
    assert any((tmp_path / "checkpoints").iterdir())
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["eval_loss"] > 710
    assert record["perplexity"] == np.inf


def test_models_that_cannot_be_trained_whole(rng: np.random.Generator, tmp_path: Path):
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    model = Model(module, params, module.config, GenerationConfig())
    with pytest.raises(ValueError, match="the model has adapters"):
        train(model.add_adapter(KINDS["plain"]), make_rows(rng), tmp_path, TrainingOptions(**OPTIONS))
    model.save_pretrained(tmp_path / "plain")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantize="int8")
    with pytest.raises(ValueError, match="integer weights are not trained"):
        train(quantized, make_rows(rng), tmp_path / "run", TrainingOptions(**OPTIONS))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", np.inf),
        ("epochs", 0),
        ("epochs", np.inf),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("seed", 2**32),
        ("steps", 0),
        ("steps", -1),
        ("batch_size", -2),
        ("accumulate", 0),
        ("batch_size", 2.5),
        ("warmup_steps", -1),
        ("log_every", 0),
        ("save_every", 0),
        ("eval_every", 0),
        ("final_learning_rate", np.nan),
        ("weight_decay", np.nan),
        ("max_grad_norm", -1.0),
        ("eps", -1.0),
        ("optim", "sgd"),
        ("remat", "x"),
        ("dtype", "int8"),
    ],
)
def test_options_out_of_their_range(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        TrainingOptions(**{name: value})


def test_fields_of_lora():
    """As peft.LoraConfig has them; a list goes on until the next field."""
    got = parse_lora("r=16,lora_alpha=32,target_modules=q_proj,v_proj,use_dora=true", "base")
    want = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], use_dora=True)
    assert (got.r, got.lora_alpha, got.use_dora, got.use_rslora) == (16, 32, True, want.use_rslora)
    assert set(got.target_modules or ()) == want.target_modules
    assert parse_lora("r=4,target_modules=all-linear", "base").target_modules == "all-linear"
    assert parse_lora(r"target_modules=.*\.\d{1,2}\.mlp\.\w+", "base").target_modules == r".*\.\d{1,2}\.mlp\.\w+"
    assert parse_lora("target_modules=q_proj,modules_to_save=norm", "base").modules_to_save == ("norm",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("16", "expected fields such as"),
        ("r=16,rank=3", "'rank' is none of r, lora_alpha"),
        ("r=16,r=8", "r is there twice"),
        ("r=many", "r='many' is not a value"),
        ("r=4,use_dora=perhaps", "use_dora='perhaps'"),
        ("r=0", "expected ranks above 0"),
    ],
)
def test_fields_that_are_none(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_lora(text, "base")


def test_dropout_is_refused(rng: np.random.Generator, tmp_path: Path):
    _, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM)
    base = Model(module, params, module.config, GenerationConfig())
    options = TrainingOptions(lora=LoraConfig(lora_dropout=0.1), **OPTIONS)
    with pytest.raises(ValueError, match=r"lora_dropout is 0\.1; training supports 0 alone"):
        train(base, make_rows(rng), tmp_path, options)
