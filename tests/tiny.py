"""Tiny models and tokenizers that tests build from configs.

Weights are scaled up: at the default initialisation a wrong mask moves a summed log-prob by 1e-2 and a loose
tolerance would pass it; here it moves single tokens by 0.5 and more.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fiducial.data.tokenize import TokenizedGroup
from fiducial.model.checkpoint import is_soft_capped

VOCAB = 320

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_GROUPED = {"num_key_value_heads": 2}
_WINDOW = {"sliding_window": 8}
_GEMMA = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "mistral": _GROUPED | _WINDOW,
    "gemma2": _GROUPED | _WINDOW | _GEMMA | {"query_pre_attn_scalar": 8},
    "gemma3_text": _GROUPED | _WINDOW | _GEMMA | {"query_pre_attn_scalar": 8},
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
}
"""The families the issue names, with what each needs beyond the common shape."""


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 causal LM of `family` in eval mode, with weights N(0, 0.2)."""
    config_class = transformers.CONFIG_MAPPING[family]
    config = config_class(**(_COMMON | FAMILIES.get(family, {}) | overrides))
    exact = "eager" if is_soft_capped(config) else None  # as the loader does
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=exact)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def tiny_tokenizer(*, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte, plus bos, eos, pad and the chat markers: every text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    for token in ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"):
        vocab[token] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save_checkpoint(path: Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """A checkpoint folder with model and tokenizer, as the hub would hold it."""
    tiny_model(family, seed=seed, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def save_larger_checkpoint(path: Path, *, layers: int) -> Path:
    """A checkpoint of width 512, large enough for its memory to be measured: 21M parameters in 4 layers."""
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=16_000,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def save_adapter(path: Path, base: Path, **config: Any) -> Path:
    """A rank-4 LoRA on the checkpoint `base` that has been trained: it moves the policy from its base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **config)
    adapter = get_peft_model(model, lora)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in adapter.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2)
    adapter.save_pretrained(path)
    return path


def random_groups(
    count: int, *, seed: int = 0, completions: int = 2, longest: int = 24
) -> list[TokenizedGroup]:
    """Groups of random byte tokens with uneven lengths."""
    rng = np.random.default_rng(seed)

    def ids() -> Any:
        return rng.integers(0, 256, rng.integers(1, longest), dtype=np.int32)

    return [TokenizedGroup(ids(), tuple(ids() for _ in range(completions))) for _ in range(count)]
