"""Token healing against Transformers', and where that finds nothing, against the scores of forward."""

from __future__ import annotations

import numpy as np
import pytest

from flaxqwen.generation.config import GenerationConfig
from flaxqwen.model import Model
from flaxqwen.models.qwen2 import Qwen2ForCausalLM
from tests.reference import counted_compilations, pair

tokenizers = pytest.importorskip("tokenizers", reason="a byte-level tokenizer is trained here")
transformers = pytest.importorskip("transformers", reason="the oracle is Transformers' heal_tokens")

TEXT = (
    "the theory then says: http://there.is/nothing that is thicker than their other brother's thistle; thus http: " * 3
)


@pytest.fixture(scope="module", params=[None, "<s>"], ids=["no_bos", "bos"])
def tokenizer(request):
    """A byte-level one of 330 tokens, with or without a bos token before each text."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<s>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([TEXT], trainer)
    if request.param:
        bpe.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token=request.param, padding_side="left"
    )


@pytest.fixture(scope="module")
def models():
    """Theirs and ours, which end by token 1 and pad with 0."""
    theirs, module, params = pair("Qwen2ForCausalLM", Qwen2ForCausalLM, vocab_size=330, num_hidden_layers=1)
    theirs.generation_config.update(eos_token_id=1, pad_token_id=0)
    return theirs, Model(module, params, module.config, GenerationConfig(eos_token_id=1, pad_token_id=0))


def test_prompts_are_healed_as_theirs(tokenizer, models, rng):
    """Beginnings of a text that break off anywhere but after a token with a leading space, in padded batches."""
    theirs, ours = models
    if tokenizer.bos_token is None:
        pytest.skip("Transformers' heal_tokens fails without a bos token, as Qwen2 is")
    healed = 0
    for _ in range(20):
        texts = []
        while len(texts) < 3:
            begin = int(rng.integers(len(TEXT) // 3))
            text = TEXT[begin : begin + int(rng.integers(3, 30))].strip()
            if not tokenizer.tokenize(text)[-1].startswith("Ġ"):
                texts.append(text)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        given = {"max_new_tokens": 3, "do_sample": False, "tokenizer": tokenizer, "token_healing": True}
        want = theirs.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **given).numpy()
        mask = batch["attention_mask"].numpy()
        got = ours.generate(batch["input_ids"].numpy(), attention_mask=mask, **given)
        np.testing.assert_array_equal(got, want)
        healed += int((got[:, : mask.shape[1]] != batch["input_ids"].numpy())[mask.astype(bool)].any())
    assert healed > 5


@pytest.mark.parametrize("text", ["nothing th", "is thé", "then the"])
def test_any_token_is_healed(text, tokenizer, models):
    """With a leading space, and outside ASCII: the best of the tokens that begin as it does, itself by 1 more."""
    _, ours = models
    ids = np.array([tokenizer(text, add_special_tokens=False)["input_ids"]])
    scores = np.asarray(ours(ids[:, :-1]).logits)[0, -1].copy()
    last = tokenizer.convert_ids_to_tokens(int(ids[0, -1]))
    for token, index in tokenizer.get_vocab().items():
        scores[index] += 10 * token.startswith(last) + (token == last)
    got = ours.generate(ids, tokenizer=tokenizer, token_healing=True, max_new_tokens=1, eos_token_id=None)
    bos = int(tokenizer.bos_token_id is not None)  # a column of the pad token
    assert got.shape == (1, bos + ids.shape[1] + 1)
    assert got[0, -2] == scores.argmax()


def test_values_compile_nothing_and_bad_calls_are_refused(tokenizer, models):
    _, ours = models
    given = {"max_new_tokens": 2, "token_healing": True, "tokenizer": tokenizer, "eos_token_id": None}
    ours.generate(np.array([tokenizer("nothing th")["input_ids"]]), **given)
    with counted_compilations() as compiled:
        ours.generate(np.array([tokenizer("there.is: http")["input_ids"]]), **given)
        with pytest.raises(ValueError, match="token_healing needs the model's tokenizer"):
            ours.generate(np.array([[5, 6]]), token_healing=True)
        with pytest.raises(ValueError, match="no text besides space and special tokens"):
            ours.generate(np.array([tokenizer("  ", add_special_tokens=False)["input_ids"]]), **given)
        with pytest.raises(ValueError, match="token_healing cannot go with inputs_embeds"):
            ours.generate(inputs_embeds=np.zeros((1, 3, ours.config.hidden_size)), **given)
    assert not compiled
