"""Qwen2-Audio from and to files: the names on disk and in memory, sharded; what its Model refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flaxqwen import AutoModel, AutoModelForSeq2SeqLM
from tests.models.test_qwen2_audio import AUDIO, CLIPS, expanded, models, older_prompt, theirs_of  # noqa: F401
from tests.reference import close


@pytest.mark.parametrize("layout", ["older", "newer"])
def test_both_layouts_of_names(models, rng, tmp_path: Path, layout: str):  # noqa: F811
    """Transformers writes the older names, in shards; the newer ones are those of its modules."""
    import transformers
    from safetensors.torch import save_file

    theirs = models[0]
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    if layout == "newer":
        for path in (tmp_path / "theirs").glob("model*"):
            path.unlink()
        save_file(theirs.state_dict(), tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "theirs")
    inputs = expanded(older_prompt(rng, CLIPS[0], "left"))
    wanted = theirs_of(theirs, **inputs)
    close(ours(**inputs).logits, wanted.logits)

    bare = AutoModel.from_pretrained(tmp_path / "theirs")
    assert type(bare.module).__name__ == "Qwen2AudioModel"
    close(bare(**inputs).last_hidden_state, theirs_of(theirs.model, **inputs).last_hidden_state)

    ours.save_pretrained(tmp_path / "ours", to="pytorch", max_shard_size="100KB")
    back, report = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name].numpy(), tensor.numpy())


def test_refusals(models, rng):  # noqa: F811
    ours = AutoModelForSeq2SeqLM.from_config(models[1].config)
    older = older_prompt(rng, CLIPS[1], "right")
    with pytest.raises(ValueError, match=rf"4 audio tokens \({AUDIO}\), but the 4 clips take"):
        ours(**older)
    bare = AutoModel.from_config(models[1].config)
    with pytest.raises(TypeError, match=r"no language-model head.*Qwen2-Audio by AutoModelForSeq2SeqLM"):
        bare.generate(older["input_ids"])
    with pytest.raises(ValueError, match="'qwen2_audio' does not run quantized yet"):
        AutoModelForSeq2SeqLM.from_config(models[1].config, quantize="int8")
