"""Model shapes built from configs with random weights, and what their matrix products cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "42M": {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "1B": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
"""tiny: shows that a program runs. 42M: 25.7M in the body, 16.4M in the embedding. 1B: 0.97B and 0.26B."""

Product = tuple[int, int]
"""Input and output features of one linear layer."""


@dataclass(frozen=True)
class Cost:
    """Matrix products of one model: what a step must multiply, whoever computes it.

    Only what cannot be avoided counts: every real token once through the body (a pair's prompt once), every
    scored token once through the head. Attention's own products, which no weight takes part in, are counted
    apart.
    """

    body: tuple[Product, ...]
    head: Product
    query_width: int
    """Width of all query heads of all layers."""

    def forward(self, body_tokens: int, scored_tokens: int) -> float:
        """Floating-point operations of one forward pass: 2 per weight and token."""
        body = sum(rows * columns for rows, columns in self.body)
        return 2.0 * (body * body_tokens + self.head[0] * self.head[1] * scored_tokens)

    def training(self, body_tokens: int, scored_tokens: int) -> float:
        """Forward plus both backward products: three times the forward."""
        return 3 * self.forward(body_tokens, scored_tokens)

    def attention(self, visible_keys: int) -> float:
        """Scores and weighted values of one forward pass, for so many visible query-key pairs."""
        return 4.0 * self.query_width * visible_keys


def config(shape: str, *, longest: int) -> LlamaConfig:
    """The Llama config of `shape`."""
    return LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=longest,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )


def cost(llama: LlamaConfig) -> Cost:
    """The matrix products of one forward pass through `llama`."""
    hidden, inner = llama.hidden_size, llama.intermediate_size
    head_dim = llama.head_dim or hidden // llama.num_attention_heads
    queries = llama.num_attention_heads * head_dim
    keys = (llama.num_key_value_heads or llama.num_attention_heads) * head_dim
    attention: tuple[Product, ...] = ((hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden))
    layer = (*attention, (hidden, inner), (hidden, inner), (inner, hidden))
    depth = llama.num_hidden_layers
    return Cost(layer * depth, (hidden, llama.vocab_size), queries * depth)


def save_checkpoint(
    shape: str, folder: Path, *, longest: int, seed: int = 0, device: torch.device | None = None
) -> None:
    """Random weights, drawn on `device`, and a tokenizer of the vocabulary's size, as a checkpoint folder."""
    torch.manual_seed(seed)
    with device or torch.device("cpu"):
        model = LlamaForCausalLM(config(shape, longest=longest))
    model.save_pretrained(folder)
    tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(folder)


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Contestants get token ids; a tokenizer only lends its special tokens: word `w7` is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{index}": index for index in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", pad_token="w0", unk_token="w1")
