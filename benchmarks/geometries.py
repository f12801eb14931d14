"""The official geometries of Qwen2.5: a benchmark runs anywhere, with random weights and nothing to download."""

from __future__ import annotations

from flaxqwen.config import Qwen2Config

# name: hidden, feed-forward, layers, heads, key/value heads, vocabulary, tied head
GEOMETRIES = {
    "tiny": (256, 1024, 2, 4, 2, 8192, True),
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "14b": (5120, 13824, 48, 40, 8, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, False),
}


def config(name: str) -> Qwen2Config:
    """The config of a geometry."""
    hidden, wide, layers, heads, kv_heads, vocabulary, tied = GEOMETRIES[name]
    return Qwen2Config.from_dict(
        {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": tied,
            "rope_theta": 1e6,
        }
    )
