"""Keys that must be read together to mean something: precision, attention, method, reference.

Each conversion takes the settings that are set and yields values, errors and notes; none of them raises.
"""

from typing import Any

from fiducial.config.outcomes import Note, Outcomes, Put, Refuse, Settings

PRECISIONS = ("bf16", "bfloat16", "fp16", "float16", "float32")

ATTENTION_ALIASES = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "flex_attention": "flex_attention",
    "xformers_attention": "sdpa",
}
"""axolotl's switches, as transformers' `attn_implementation`; xformers computes what sdpa computes."""


def precision(settings: Settings) -> Outcomes:
    """How weights are held and which precision products have."""
    wrong = [key for key in PRECISIONS if not _is_precision(key, settings.get(key))]
    yield from (Refuse(key, _must_be(key, settings[key])) for key in wrong)
    chosen = [key for key in PRECISIONS if settings.get(key) and key not in wrong]
    if len(chosen) > 1:
        yield Refuse(chosen[1], f"contradicts {chosen[0]}; keep one of them")
    elif not wrong:
        yield from _one_precision(chosen[0] if chosen else "bf16", settings)
    yield from _tf32(settings.get("tf32"))


def _must_be(key: str, value: Any) -> str:
    words = f"must be true{', false, auto or full' if key == 'bf16' else ' or false'}"
    if value in ("true", "false"):
        return f"{words}, without quotes"
    return f"{words}; write bf16: {value}" if value in ("auto", "full") else words


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
