"""Keys that must be read together to mean something: precision, attention, method, reference.

Each conversion takes the settings that are set and yields values, errors and notes; none of them raises.
"""

from typing import Any, get_args

from fiducial.config.methods import AnyMethod, MethodConfig
from fiducial.config.outcomes import Deciding, Key, Note, Outcomes, Put, Refuse, Settings

PRECISIONS = ("bf16", "bfloat16", "fp16", "float16", "float32")

ATTENTION_ALIASES = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "flex_attention": "flex_attention",
    "xformers_attention": "sdpa",
}
"""axolotl's switches, as transformers' `attn_implementation`; xformers computes what sdpa computes."""

METHODS: dict[str, type[MethodConfig]] = {
    method.model_fields["name"].default: method for method in get_args(get_args(AnyMethod)[0])
}
"""`rl` to the method."""

ONLINE_METHODS = ("grpo", "gdpo", "ebft")

DPO_LOSSES = {"sigmoid": "dpo", "ipo": "ipo"}
"""`dpo_loss_type` to the method that has this loss."""

HYPERPARAMETERS = {
    "dpo_label_smoothing": ("label_smoothing", ("dpo", "cpo")),
    "simpo_gamma": ("gamma", ("simpo",)),
    "cpo_alpha": ("cpo_alpha", ("simpo", "cpo")),
    "kto_desirable_weight": ("desirable_weight", ("kto",)),
    "kto_undesirable_weight": ("undesirable_weight", ("kto",)),
}
"""Key to the method's field, and the methods that read it."""

BETA_OF = {"dpo_beta": ("dpo", "ipo"), "orpo_alpha": ("orpo",)}
"""Keys that mean beta for some methods only."""


def precision(settings: Settings) -> Outcomes:
    """How weights are held and which precision products have."""
    wrong = [key for key in PRECISIONS if not _is_precision(key, settings.get(key))]
    yield from (
        Refuse(key, f"must be true{', false, auto or full' if key == 'bf16' else ' or false'}")
        for key in wrong
    )
    chosen = [key for key in PRECISIONS if settings.get(key) and key not in wrong]
    if len(chosen) > 1:
        yield Refuse(chosen[1], f"contradicts {chosen[0]}; keep one of them")
    elif not wrong:
        yield from _one_precision(chosen[0] if chosen else "bf16", settings)
    yield from _tf32(settings.get("tf32"))


def _is_precision(key: str, value: Any) -> bool:
    return value is None or isinstance(value, bool) or (key == "bf16" and value in ("auto", "full"))


def _one_precision(key: str, settings: Settings) -> Outcomes:
    adapter = settings.get("adapter") is not None
    value = settings.get(key, "auto")
    if key == "float16" and not adapter:
        yield Refuse(key, "float16 weights lose small updates; write fp16: true, which keeps float32 weights")
        return
    base: str
    autocast: str | None
    if value == "auto":
        base, autocast = ("auto" if adapter else "float32"), "auto"
    elif key == "float32" or value is False:
        base, autocast = "float32", None
    elif key == "bfloat16" or value == "full":
        base, autocast = "bfloat16", None
    else:
        autocast = "bfloat16" if key == "bf16" else "float16"
        base = autocast if adapter else "float32"
    yield Put("model.dtype", base, key)
    yield Put("model.autocast", autocast, key)


def _tf32(value: Any) -> Outcomes:
    if value == "auto":
        yield Note("tf32", "TF32 stays off: it rounds factors to 10 bits; write tf32: true to allow it")
    elif value is not None:
        yield Put("model.tf32", value, "tf32")


def attention(settings: Settings) -> Outcomes:
    """Stock attention for padded rows, and whether rows must be packed."""
    named = settings.get("attn_implementation")
    if named in ("sage", "fp8"):
        yield Refuse(
            "attn_implementation", "not exact; write sdpa, eager, flash_attention_2 or flex_attention"
        )
    elif named is not None:
        named = "sdpa" if named == "xformers" else named
        yield Put("model.attn_implementation", named, "attn_implementation")
    for key, meant in ATTENTION_ALIASES.items():
        switch = settings.get(key, False)
        if not isinstance(switch, bool):
            yield Refuse(key, f"must be true or false; write attn_implementation: {meant}")
        elif switch and named not in (None, meant):
            yield Refuse(key, f"contradicts {named}; keep attn_implementation alone")
        elif switch:
            named = meant
            yield Put("model.attn_implementation", meant, key)
    yield from _packing(settings)


def _packing(settings: Settings) -> Outcomes:
    if settings.get("sample_packing") is False:
        yield Note(
            "sample_packing", "packed rows give the same result; they are used where the model allows it"
        )
    elif "sample_packing" in settings:
        yield Put("model.packing", settings["sample_packing"], "sample_packing")
    if "eval_sample_packing" in settings:
        yield Note("eval_sample_packing", "evaluation packs rows as training does, with the same result")


def method(settings: Settings) -> Outcomes:
    """The preference method and its hyperparameters."""
    name = settings.get("rl")
    own = [
        key
        for key in ("rl_beta", *BETA_OF, *HYPERPARAMETERS, "dpo_loss_type", "dpo_loss_weights")
        if key in settings
    ]
    if name is None:
        yield from (Refuse(key, "has no effect without rl; write rl: dpo, or remove it") for key in own)
        return
    if not isinstance(name, str) or name not in METHODS:
        yield Refuse("rl", _unknown_method(name))
        return
    loss = yield from _dpo_loss(name, settings)
    yield Put("method.name", loss, "rl")
    yield from _beta(name, settings)
    for key, (field, methods) in HYPERPARAMETERS.items():
        if key in settings and loss in methods:
            yield Put(f"method.{field}", settings[key], key)
        elif key in settings:
            yield _without_effect(key, settings[key], loss, methods)


def _unknown_method(name: Any) -> str:
    if name in ONLINE_METHODS:
        return "generates while it trains; Fiducial learns from given preferences: use another tool or dpo"
    return f"no such method; write one of {', '.join(METHODS)}"


def _without_effect(key: str, value: Any, name: str, methods: tuple[str, ...]) -> Refuse | Note:
    if not value:
        return Note(key, f"rl: {name} has no such term")
    return Refuse(key, f"has no effect with {name}; it belongs to rl: {' or '.join(methods)}; remove it")


def _dpo_loss(name: str, settings: Settings) -> Deciding[str]:
    """Yields what is wrong with `dpo_loss_type`, and returns the method it names."""
    given = settings.get("dpo_loss_type")
    losses = [given] if isinstance(given, str) else given
    if "dpo_loss_weights" in settings:
        if isinstance(losses, list) and len(losses) == 1 and settings["dpo_loss_weights"] == [1.0]:
            yield Note("dpo_loss_weights", "one loss has all the weight")
        else:
            yield Refuse("dpo_loss_weights", "weighted losses are not in this version; remove it")
    if losses is None:
        return name
    if name != "dpo":
        yield Refuse("dpo_loss_type", f"has no effect with rl: {name}; it belongs to rl: dpo; remove it")
        return name
    if not (isinstance(losses, list) and len(losses) == 1 and losses[0] in list(DPO_LOSSES)):
        yield Refuse(
            "dpo_loss_type",
            f"not in this version; write one of {', '.join(f'[{loss}]' for loss in DPO_LOSSES)}",
        )
        return name
    return DPO_LOSSES[losses[0]]


def _beta(name: str, settings: Settings) -> Outcomes:
    trl = settings.get("trl")
    given: list[tuple[Key, Any]] = [(key, settings[key]) for key in ("rl_beta", *BETA_OF) if key in settings]
    if isinstance(trl, dict) and trl.get("beta") is not None:
        given.append((("trl", "beta"), trl["beta"]))
    for key, value in given:
        methods = BETA_OF.get(str(key), (name,))
        if name not in methods:
            yield _without_effect(str(key), value, name, methods)
        elif _number(value) != _number(given[0][1]):
            first = given[0][0] if isinstance(given[0][0], str) else ".".join(map(str, given[0][0]))
            yield Refuse(key, f"contradicts {first}: {given[0][1]}; both mean beta: keep one")
        else:
            yield Put("method.beta", value, key)


def _number(value: Any) -> Any:
    """`value` as a number, if it is one in any spelling."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def reference(settings: Settings) -> Outcomes:
    """Which policy is the reference, and when it is scored."""
    block = settings.get("reference", {})
    if not isinstance(block, dict):
        yield Refuse("reference", "must be a mapping, for example reference: {source: separate_model}")
        return
    yield from (Put(f"reference.{field}", value, ("reference", field)) for field, value in block.items())
    copy = settings.get("rl_adapter_ref_model", False)
    if not isinstance(copy, bool):
        yield Refuse("rl_adapter_ref_model", "must be true or false")
    elif copy and settings.get("adapter") is None:
        yield Refuse(
            "rl_adapter_ref_model", "has no effect without adapter; write reference: {source: separate_model}"
        )
    elif copy and block.get("source", "separate_model") != "separate_model":
        yield Refuse(
            "rl_adapter_ref_model", f"contradicts reference.source: {block['source']}; keep one of them"
        )
    elif copy:
        yield Put("reference.source", "separate_model", "rl_adapter_ref_model")
    yield from _schedule(settings.get("precompute_ref_log_probs"), block)


def _schedule(precompute: Any, block: dict[str, Any]) -> Outcomes:
    if precompute is None:
        return
    key, meant = "precompute_ref_log_probs", "precomputed" if precompute else "live"
    if not isinstance(precompute, bool):
        yield Refuse(key, "must be true or false")
    elif block.get("schedule", meant) != meant:
        yield Refuse(
            key, f"contradicts reference.schedule: {block['schedule']}; keep reference.schedule alone"
        )
    else:
        yield Put("reference.schedule", meant, key)


def loftq(settings: Settings) -> Outcomes:
    """`peft: {loftq_config: {loftq_bits: 4}}`, which also means that the adapter starts from LoftQ."""
    peft = settings.get("peft", {})
    config = peft.get("loftq_config", {}) if isinstance(peft, dict) else None
    if not isinstance(config, dict) or set(config) - {"loftq_bits"}:
        yield Refuse(
            "peft", "may hold loftq_config: {loftq_bits: 4} and nothing else; other settings are peft_* keys"
        )
    elif "loftq_bits" in config:
        yield Put("adapter.loftq_bits", config["loftq_bits"], ("peft", "loftq_config", "loftq_bits"))
        if settings.get("peft_init_lora_weights", "loftq") != "loftq":
            yield Refuse(
                "peft_init_lora_weights", "contradicts peft.loftq_config; write loftq, or remove one"
            )
        yield Put("adapter.init_lora_weights", "loftq", "peft")


def sharding(settings: Settings) -> Outcomes:
    """FSDP: its version may stand beside its options or among them."""
    config = settings.get("fsdp_config")
    if not isinstance(config, dict):
        if config is not None:
            yield Put("distributed.fsdp_config", config, "fsdp_config")
        config = {}
    elif config:
        inner = {option: value for option, value in config.items() if option != "fsdp_version"}
        yield Put("distributed.fsdp_config", inner, "fsdp_config")
    if "fsdp_version" in settings:
        yield Put("distributed.fsdp_version", settings["fsdp_version"], "fsdp_version")
    elif "fsdp_version" in config:
        yield Put("distributed.fsdp_version", config["fsdp_version"], ("fsdp_config", "fsdp_version"))
