"""What the policy is before step 1, and which references equal it: the facts a plan is decided on.

Each `why_…_differs` says in a clause why a kind of reference would not be the starting policy, None if it
would. What PEFT does was measured (docs/reference.md): an initialisation that is not listed here counts as
one that changes the policy, because guessing wrong would compare with another model.
"""

import re

from fiducial.config.schema import AdapterConfig, RunConfig
from fiducial.reference.checkpoint import same_place
from fiducial.reference.facts import AdapterFacts, Facts, ModelFacts
from fiducial.reference.holding import reference_bits
from fiducial.reference.kinds import Schedule, Source, Sync

IDENTITY_INITS = frozenset({"true", "gaussian", "eva"})
"""`peft_init_lora_weights` that leave the policy exactly as it was: on and off agree at step 0."""
_ON_UNTOUCHED_BASE = IDENTITY_INITS | {"false"}
"""Those after which the base weights are what they were."""
ROUNDED_INITS = ("pissa", "olora", "orthogonal")
"""Those that split base weights in two: the sum is the base again up to the rounding of its dtype, 4e-6 nats
a token in float32 and 0.08 in bfloat16 (measured)."""
_SHARED = re.compile(r"\b(embed_tokens|embed_in|wte|lm_head|embed_out)\.lora_")
"""Adapter weights on an embedding or a head."""


def no_reference_reason(cfg: RunConfig) -> str | None:
    """Why the loss needs no reference; None if it does."""
    if cfg.method is None:
        return "No preference method is set (`rl`), so there is nothing to compare with."
    if not cfg.method.needs_reference:
        return f"The {cfg.method.title} loss does not compare with a reference."
    if cfg.method.is_constant:
        return "With beta 0 the reference has no weight in the loss."
    return None


def streams(cfg: RunConfig) -> bool:
    """Whether rows arrive once, so that nothing can be scored ahead of time."""
    return cfg.data is not None and cfg.data.streaming


def reads_distributions(cfg: RunConfig) -> bool:
    """Whether the loss reads the reference's probability of every token of the vocabulary."""
    return cfg.method is not None and cfg.method.needs_distribution


def writes_through(cfg: RunConfig, schedule: Schedule) -> bool:
    """Whether a reference beside the policy scores a row once for as long as it stands still.

    Where the user writes `schedule: live`, it is scored at every step.
    """
    if schedule is Schedule.PRECOMPUTED or reads_distributions(cfg):
        return False
    return schedule is Schedule.SYNCED or (streams(cfg) and cfg.reference.schedule == "auto")


def names_another_policy(cfg: RunConfig) -> bool:
    """Whether the user asked to compare with something other than the policy the run starts from."""
    asked = cfg.reference
    if asked.endpoint is not None:
        return True
    if asked.model is None and asked.adapter is None:
        return False
    if not on_starting_base(cfg):
        return True
    if asked.adapter is not None:
        return not _is_resumed(cfg, asked.adapter)
    return cfg.adapter is not None and not adapter_starts_at_identity(cfg)


def names_another_adapter(cfg: RunConfig) -> bool:
    """Whether that other policy is another adapter on the base that the run starts from."""
    return names_another_policy(cfg) and cfg.reference.adapter is not None and on_starting_base(cfg)


def on_starting_base(cfg: RunConfig) -> bool:
    """Whether the reference is, or is put on, the checkpoint that the run starts from."""
    asked = cfg.reference
    if asked.model is None:
        return True
    named_again = same_place(asked.model, cfg.model.base_model) and asked.revision == cfg.model.revision
    return named_again and not cfg.model.reinit_weights  # which draws other weights than the named ones


def _is_resumed(cfg: RunConfig, adapter: str) -> bool:
    resumed = cfg.adapter.path if cfg.adapter is not None else None
    return resumed is not None and same_place(adapter, resumed)


def resumes_adapter(cfg: RunConfig) -> bool:
    """Whether the policy starts from an adapter trained before."""
    return cfg.adapter is not None and cfg.adapter.path is not None


def adapter_starts_at_identity(cfg: RunConfig) -> bool:
    """Whether the adapter is new and leaves the base's log-probs exactly unchanged at step 0."""
    return cfg.adapter is not None and not resumes_adapter(cfg) and _init(cfg.adapter) in IDENTITY_INITS


def trains_outside_adapter(cfg: RunConfig, facts: Facts) -> str | None:
    """The setting that trains base weights in place beside an adapter; None if the base stays untouched."""
    if cfg.adapter is None:
        return None
    if cfg.model.unfrozen_parameters is not None:
        return "unfrozen_parameters"
    bias = facts.adapter.bias if facts.adapter else cfg.adapter.bias
    return f"peft_bias: {bias}" if bias != "none" else None


def why_adapter_off_differs(cfg: RunConfig, facts: Facts) -> str | None:
    """Why the policy with its adapter off is not the starting policy, now or after some steps."""
    if cfg.adapter is None:
        return "there is no adapter to switch off"
    if resumes_adapter(cfg):
        return f"lora_model_dir: {cfg.adapter.path} is part of the starting policy, and off is the bare base"
    if not adapter_starts_at_identity(cfg):
        return (
            f"peft_init_lora_weights: {_init(cfg.adapter)} changes the base weights or the policy at step 0, "
            "and off does not undo it"
        )
    if setting := trains_outside_adapter(cfg, facts):
        return f"{setting} trains base weights in place, which switching the adapter off does not restore"
    return None


def why_frozen_copy_differs(cfg: RunConfig, facts: Facts) -> str | None:
    """Why the base with a frozen copy of the starting adapter is not, or cannot be, the starting policy."""
    if names_another_adapter(cfg):
        return _why_named_adapter_differs(cfg, facts)
    if cfg.adapter is None:
        return "there is no adapter to copy"
    if setting := trains_outside_adapter(cfg, facts):
        return f"{setting} trains base weights, which a frozen adapter shares with the policy"
    if facts.adapter.target_parameters if facts.adapter else cfg.adapter.target_parameters:
        return "lora_target_parameters: a frozen copy of such an adapter is not supported"
    return None


def frozen_copy_is_start(cfg: RunConfig, facts: Facts) -> bool:
    """Whether a frozen copy of the adapter gives the starting policy at every step."""
    return why_frozen_copy_differs(cfg, facts) is None


def why_checkpoint_differs(cfg: RunConfig, facts: Facts) -> str | None:
    """Why loading a checkpoint (again) with its adapter merged in is not the reference asked for."""
    if names_another_policy(cfg):
        return _why_merged_differs(cfg, facts.reference or facts.model, facts.reference_adapter)
    if cfg.adapter is None:
        return None
    if resumes_adapter(cfg):
        return _why_merged_differs(cfg, facts.model, facts.adapter)
    if cfg.adapter.layer_replication:
        return "peft_layer_replication gives the policy layers that the checkpoint does not have"
    return _why_start_differs(cfg, _init(cfg.adapter))


def why_cannot_move(cfg: RunConfig, source: Source, sync: Sync) -> str | None:
    """Why `source` could not follow the policy as `sync` says."""
    if names_another_policy(cfg):
        return "a reference that moves towards the policy must start as the policy"
    if source in (Source.ADAPTER_OFF, Source.INITIAL_POLICY):
        return "it is the starting policy at every step, and cannot move"
    if source is Source.SEPARATE_MODEL:
        return _why_model_cannot_move(cfg)
    if cfg.adapter is not None and not sync.copies:
        return (
            f"reference.mixup_alpha: {sync.mixup_alpha} would mix the adapter's matrices A and B one by one, "
            "and the product of two mixtures is not the mixture of two products"
        )
    return None


def _why_model_cannot_move(cfg: RunConfig) -> str | None:
    if reference_bits(cfg) or cfg.reference.offload is not None:
        return "weights in 8 or 4 bits, or kept elsewhere until they compute, cannot move"
    if cfg.adapter is not None:
        return "with an adapter, only a copy of the adapter can follow the policy"
    return None


def _why_named_adapter_differs(cfg: RunConfig, facts: Facts) -> str | None:
    """Why the adapter named for the reference cannot be held beside the policy's, on the same base."""
    if cfg.adapter is None:
        return "the base itself is trained, so an adapter on it would not stay what it is"
    if setting := trains_outside_adapter(cfg, facts):
        return f"{setting} trains base weights, which the reference's adapter would share with the policy"
    own = _init(facts.adapter or cfg.adapter)
    if own not in _ON_UNTOUCHED_BASE:
        return f"the policy's adapter ({own}) rewrites base weights, on which the reference's was not trained"
    policy = cfg.adapter
    more = policy.modules_to_save or policy.trainable_token_indices or policy.target_parameters
    if more or policy.layer_replication or _more_than_factors(facts.adapter):
        return "the policy's adapter holds more than low-rank factors, which the reference's does not"
    return None if facts.reference_adapter is None else _why_not_beside(facts.reference_adapter)


def _why_not_beside(reference: AdapterFacts) -> str | None:
    """Why an adapter on disk cannot stand beside the policy's own."""
    if _more_than_factors(reference):
        return "the reference's adapter holds more than low-rank factors, which cannot stand beside another's"
    if (init := _init(reference)) not in _ON_UNTOUCHED_BASE:
        return f"the reference's adapter ({init}) rewrites the base weights below it, which the policy shares"
    return None


def _more_than_factors(adapter: AdapterFacts | None) -> bool:
    """Whether an adapter on disk holds whole modules, token rows, biases, parts of parameters, or layers."""
    if adapter is None:
        return False
    beside = any(".lora_" not in name for name in adapter.tensors or {})
    more = adapter.modules_to_save or adapter.target_parameters or adapter.layer_replication
    return beside or adapter.bias != "none" or bool(more)


def _why_merged_differs(cfg: RunConfig, base: ModelFacts, adapter: AdapterFacts | None) -> str | None:
    """Why `base` with the adapter merged in is not, or cannot be, the base with the adapter."""
    if adapter is None:
        return None
    if cfg.reference.offload is not None:
        return f"{adapter.location} cannot be merged into weights that are kept elsewhere (reference.offload)"
    if adapter.layer_replication:
        return f"{adapter.location} stacks layers that share weights, and merging it would change all of them"
    if reference_bits(cfg) or base.quantized:
        return f"merging {adapter.location} into quantized weights would round them again"
    shared = [name for name in adapter.tensors or {} if ".lora_" in name and _SHARED.search(name)]
    if base.tied_embeddings and shared:
        return f"{adapter.location} is on one of two tied weights, and merging it would change both"
    return None


def _why_start_differs(cfg: RunConfig, init: str) -> str | None:
    """Why the base with a new adapter, switched on, is not the base."""
    if init in IDENTITY_INITS:
        return None
    if not init.startswith(ROUNDED_INITS):
        return f"peft_init_lora_weights: {init} makes the starting policy another one than the checkpoint"
    if cfg.model.dtype == "float32":
        return None
    return (
        f"peft_init_lora_weights: {init} splits the base weights, and in any dtype but float32 (bf16: false) "
        "the parts do not add up to the checkpoint again"
    )


def _init(adapter: AdapterConfig | AdapterFacts) -> str:
    return str(adapter.init_lora_weights).lower()
