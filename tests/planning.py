"""Runs and facts to plan with, without a checkpoint on disk."""

import re
from typing import Any

from fiducial.config.methods import DPOConfig, MethodConfig
from fiducial.config.schema import (
    AdapterConfig,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    ReferenceConfig,
    RunConfig,
)
from fiducial.reference.facts import AdapterFacts, Facts, ModelFacts
from fiducial.reference.plan import ReferencePlan, Schedule, Source
from fiducial.reference.shapes import Sizes

DPO = DPOConfig()


def run(
    *,
    method: MethodConfig | None = DPO,
    adapter: dict[str, Any] | None = None,
    streaming: bool = False,
    reference: dict[str, Any] | None = None,
    **model: Any,
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(**({"base_model": "base"} | model)),
        adapter=None if adapter is None else AdapterConfig(**({"kind": "lora"} | adapter)),
        reference=ReferenceConfig(**(reference or {})),
        method=method,
        data=DataConfig(datasets=(DatasetConfig(path="pairs.jsonl"),), streaming=streaming),
    )


def facts_of(
    cfg: RunConfig, *, has_biases: bool = True, tied: bool = False, reference_vocab: int = 320, **adapter: Any
) -> Facts:
    """Facts as `gather_facts` would find them for `cfg`."""

    def model(location: str, vocab: int = 320) -> ModelFacts:
        sizes = Sizes(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocab_size=vocab)
        return ModelFacts(
            location=location,
            model_type="llama",
            architecture="LlamaForCausalLM",
            num_parameters=36_000,
            sizes=sizes,
            gated=True,
            tied_embeddings=tied,
            has_biases=has_biases,
            dtype="float32",
            quantized=False,
            tensors={},
            shapes_are_exact=True,
        )

    resumed = None
    if cfg.adapter is not None and cfg.adapter.path is not None:
        given = {"peft_type": "LORA", "bias": cfg.adapter.bias} | adapter
        resumed = AdapterFacts(cfg.adapter.path, **given)
    asked = cfg.reference
    checkpoint = asked.model is not None and asked.endpoint is None
    reference = model(str(asked.model), reference_vocab) if checkpoint else None
    other = AdapterFacts(asked.adapter, "LORA", key="reference.adapter") if asked.adapter else None
    return Facts(model(cfg.model.base_model), resumed, reference, reference_adapter=other)


def decision(result: ReferencePlan) -> tuple[Source, Schedule | None]:
    return result.source, result.schedule


def assert_names_key_and_remedy(message: str) -> None:
    assert re.match(r"(reference\.\w+|lora_model_dir): ", message), message
    assert re.search(r"\b(Write|Remove|Set) ", message), message
