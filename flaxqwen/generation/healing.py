"""Token healing: the last token of a prompt is grown anew, so that a prompt may break off within a word.

`"http:"` ends in a token that hardly ever stands before `"//"`, because text has `"://"` as one token. The prompt
without it is continued by one token, with a bias for those that begin as it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# What the tokens that begin as the last one get, and what that one gets besides, in units of scores.
EXTENSION_BIAS, KEEP_BIAS = 10.0, 1.0


def heal(
    ids: np.ndarray, mask: np.ndarray, tokenizer: Any, pad_id: int, regrow: Callable[[np.ndarray, dict], int]
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with their last tokens healed; text is stripped of space at its ends, and of special tokens.

    Where Transformers searches the vocabulary for the last token's text, which there is none of with a leading space
    or outside ASCII, the token itself is searched for here.

    Args:
      ids, mask: [B, P] int32, and bool: what is no padding.
      tokenizer: of the model.
      pad_id: for the padding, on the left.
      regrow: (prompt [1, P'], {(token,): bias}) -> the next token.

    Returns:
      ids [B, P''] int32, mask [B, P''] bool.

    Raises:
      ValueError: no tokenizer, or a prompt without text.

    Source: `heal_tokens` in transformers/generation/utils.py.
    """
    if tokenizer is None:
        raise ValueError("token_healing needs the model's tokenizer: give it as tokenizer=")
    texts = tokenizer.batch_decode([row[kept] for row, kept in zip(ids, mask, strict=True)], skip_special_tokens=True)
    encoded = tokenizer([text.strip() for text in texts])["input_ids"]
    width, start, vocabulary = max(map(len, encoded)), tokenizer.bos_token_id, tokenizer.get_vocab()
    rows = np.full((len(encoded), width), pad_id, np.int32)
    for row, tokens in zip(rows, encoded, strict=True):
        tokens = [token for token in tokens if token != start]
        if not tokens:
            raise ValueError("token_healing: a prompt has no text besides space and special tokens")
        before, last = tokens[:-1], tokens[-1]
        if not before and start is not None and width > 1:
            before = [start]  # in place of a pad token
        biases = extensions(tokenizer.convert_ids_to_tokens(last), vocabulary)
        if before and len(biases) > 1:
            biases[(last,)] += KEEP_BIAS
            tokens = [*before, regrow(np.array([before], np.int32), biases)]
        row[width - len(tokens) :] = tokens
    # A bos token that the tokenizer adds becomes a pad token, but counts: so it does in Transformers.
    lengths = np.array([[len(tokens)] for tokens in encoded])
    return rows, np.arange(width) >= width - lengths


def extensions(prefix: str, vocabulary: dict[str, int]) -> dict[tuple[int, ...], float]:
    """The bias of each token that begins as `prefix`, itself among them."""
    return {(token_id,): EXTENSION_BIAS for token, token_id in vocabulary.items() if token.startswith(prefix)}
