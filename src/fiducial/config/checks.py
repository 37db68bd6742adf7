"""Rules that tie keys together: what contradicts, what needs what, what has no effect.

Each check reads the settings in the user's words and yields errors and notes. Types are the schema's
business: a check says nothing about a value it cannot compare.
"""

import re
from collections.abc import Iterable
from typing import Any

from fiducial.config.method_keys import as_number, why_no_reference
from fiducial.config.outcomes import Key, Note, Outcomes, Refuse, Settings
from fiducial.config.schedule_keys import held_out
from fiducial.config.template_names import objection
from fiducial.config.unsupported_model import ROPE

QUANTISED = ("load_in_8bit", "load_in_4bit")

_DECOMPOSED = ("pissa", "mica", "loftq")
"""Starts of an adapter that PEFT makes from base weights held in full alone."""

ADAPTER_OPTIONS = ("lora_", "peft_")
"""How keys begin that only an adapter reads; `peft` itself is one too."""

_CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "early_stop", "debug")
"""Options of torch's activation checkpointing that YAML can hold."""

_SAVE_ROWS = "rows are read from a file or folder: save them (save_to_disk, to_json) and give its path"

EXCLUSIVE = (
    ("warmup_steps", "warmup_ratio"),
    ("val_set_size", "test_datasets"),
    ("load_in_8bit", "load_in_4bit"),
    ("load_in_8bit", "reinit_weights"),
    ("load_in_4bit", "reinit_weights"),
)

NEEDS = (
    ("peft_layers_pattern", "peft_layers_to_transform", "the pattern says where those layers are"),
    ("greater_is_better", "metric_for_best_model", "it says which way that metric counts"),
    ("streaming", "max_steps", "a stream has no length to count epochs by"),
    ("streaming_multipack_buffer_size", "streaming", "other data is shuffled as a whole"),
)
"""A key, the key it needs, and why."""


def check(settings: Settings) -> Outcomes:
    """Everything wrong between the keys of `settings`."""
    for rule in (
        _pairs,
        _adapter,
        _quantisation,
        _reference,
        _data,
        _streaming,
        _evaluation,
        _distributed,
        _templates,
        _expressions,
        _leftovers,
    ):
        yield from rule(settings)


def _pairs(settings: Settings) -> Outcomes:
    for first, second in EXCLUSIVE:
        if settings.get(first) and settings.get(second):
            yield Refuse(second, f"contradicts {first}; keep one of them")
    if settings.get("warmup_steps") == 0 and settings.get("warmup_ratio"):
        yield Refuse("warmup_ratio", "has no effect with warmup_steps: 0; keep one of them")
    for key, needed, why in NEEDS:
        if settings.get(key) and not settings.get(needed):
            yield Refuse(key, f"needs {needed}: {why}")


def _adapter(settings: Settings) -> Outcomes:
    if settings.get("adapter") is not None:
        if settings.get("lora_target_parameters") and settings.get("lora_dropout"):
            yield Refuse(
                "lora_dropout", "must be 0 with lora_target_parameters, which PEFT adapts without dropout"
            )
        return
    for key, value in settings.items():
        if key.startswith(ADAPTER_OPTIONS) or key == "peft":
            if value:
                yield Refuse(key, "has no effect without adapter; write adapter: lora, or remove it")
            else:
                yield Note(key, "there is no adapter")


def _quantisation(settings: Settings) -> Outcomes:
    adapter = settings.get("adapter")
    quantised = any(settings.get(key) for key in QUANTISED)
    if settings.get("bnb_config_kwargs") and not quantised:
        yield Refuse(
            "bnb_config_kwargs", "needs load_in_8bit or load_in_4bit: bitsandbytes is not used without"
        )
    start = settings.get("peft_init_lora_weights")
    if quantised and str(start).startswith(_DECOMPOSED):
        yield Refuse(
            "peft_init_lora_weights",
            "decomposes base weights, which are quantised here; write gaussian or true, or hold them in full",
        )
    if adapter == "qlora" and not settings.get("load_in_4bit"):
        yield Refuse("adapter", "qlora needs load_in_4bit: true; write it, or adapter: lora")
    for key in QUANTISED:
        if not settings.get(key):
            continue
        if adapter is None:
            yield Refuse(
                key, "quantised weights cannot be trained; write adapter: qlora or lora, or remove it"
            )
        if settings.get("fsdp_version") or settings.get("fsdp_config"):
            yield Refuse(key, "quantised weights cannot be sharded by FSDP 2; remove it or fsdp_version")


def _reference(settings: Settings) -> Outcomes:
    block = settings.get("reference")
    block = block if isinstance(block, dict) else {}
    source, schedule = block.get("source", "auto"), block.get("schedule", "auto")
    asked: list[tuple[Key, Any]] = [(("reference", key), value) for key, value in block.items()]
    asked.append(("precompute_ref_log_probs", settings.get("precompute_ref_log_probs")))
    trl = settings.get("trl")
    if isinstance(trl, dict):
        asked.append((("trl", "sync_ref_model"), trl.get("sync_ref_model")))
    asked = [(key, value) for key, value in asked if value not in (None, False, "auto", "none")]
    if why := why_no_reference(settings):
        yield from (Refuse(key, f"has no effect: {why}; remove it") for key, _ in asked)
        return
    if source == "none":
        yield Refuse(
            ("reference", "source"),
            f"rl: {settings['rl']} needs a reference; write auto, or rl: orpo, simpo or cpo",
        )
    if source == "initial_policy" and schedule in ("live", "synced"):
        yield Refuse(
            ("reference", "schedule"), "the initial policy is gone after step 1; write precomputed or auto"
        )
    yield from _reference_details(block, source)
    if source in ("adapter_off", "frozen_adapter") and settings.get("adapter") is None:
        yield Refuse(("reference", "source"), f"{source} needs an adapter; write auto or separate_model")


HELD = ("dtype", "load_in_8bit", "load_in_4bit", "device", "offload")
"""How a second model is held."""


def _reference_details(block: Settings, source: Any) -> Outcomes:
    """Keys that say which other policy it is, or how a second model is held."""
    given = [key for key, value in block.items() if value not in (None, False)]
    if source in ("adapter_off", "frozen_adapter", "initial_policy"):
        for key in given:
            allowed = ("adapter",) if source == "frozen_adapter" else ()
            if key in ("model", "revision", "adapter", *HELD) and key not in allowed:
                yield Refuse(
                    ("reference", key), f"has no effect with source: {source}; write source: separate_model"
                )
    if "load_in_8bit" in given and "load_in_4bit" in given:
        yield Refuse(("reference", "load_in_4bit"), "contradicts load_in_8bit; keep one of them")
    for key in ("load_in_8bit", "load_in_4bit", "device"):
        if key in given and "offload" in given:
            yield Refuse(("reference", key), "cannot be combined with offload; keep one of them")
    yield from _endpoint(block, given, source)


def _endpoint(block: Settings, given: list[str], source: Any) -> Outcomes:
    """A reference behind a server."""
    if "endpoint" not in given:
        if source == "endpoint":
            yield Refuse(("reference", "source"), "endpoint needs reference.endpoint: the server's URL")
        return
    if "model" not in given:
        yield Refuse(("reference", "endpoint"), "needs reference.model: the model's name on that server")
    if source not in ("auto", "endpoint"):
        yield Refuse(("reference", "endpoint"), f"contradicts source: {source}; keep one of them")
    for key in ("adapter", *HELD):
        if key in given:
            yield Refuse(("reference", key), "has no effect with endpoint: nothing is loaded here; remove it")
    if not str(block["endpoint"]).startswith(("http://", "https://")):
        yield Refuse(("reference", "endpoint"), "must be a URL, for example http://localhost:8000/v1")
    elif "@" in str(block["endpoint"]) or "?" in str(block["endpoint"]):
        yield Refuse(
            ("reference", "endpoint"),
            "must hold no credentials or query; put a key into the environment as FIDUCIAL_ENDPOINT_KEY",
        )


def _data(settings: Settings) -> Outcomes:
    held = as_number(settings.get("val_set_size"))
    if isinstance(held, float) and held > 1 and not held.is_integer():
        yield Refuse(
            "val_set_size", "from 1 on it is a number of rows: write a whole one, or a share below 1"
        )
    for key in ("datasets", "test_datasets"):
        yield from _paths_alone(key, settings.get(key))
    if settings.get("datasets") == []:
        yield Refuse("datasets", "is empty; name at least one: datasets: [{path: ...}]")
    if settings.get("datasets") is None:
        for key in ("test_datasets", "val_set_size", "streaming"):
            if settings.get(key):
                yield Refuse(key, "has no effect without datasets; add them, or remove it")
    elif settings.get("rl") is not None and "learning_rate" not in settings:
        yield Note(
            "learning_rate",
            "not set: 1e-06, which suits full fine-tuning; adapters usually want 10 times more",
        )


def _paths_alone(key: str, given: Any) -> Outcomes:
    """A dataset's path, or from Python its rows, where a mapping should be."""
    if isinstance(given, str):
        yield Refuse(key, f"must be a list of mappings; write {key}: [{{path: {given}}}]")
    elif _are_rows(given):
        yield Refuse(key, f"must be a list of mappings; {_SAVE_ROWS}")
    for number, item in enumerate(given if isinstance(given, list) else ()):
        if isinstance(item, str):
            yield Refuse((key, number), f"must be a mapping; write {{path: {item}}}")
        elif _are_rows(item):
            yield Refuse((key, number), f"must be a mapping; {_SAVE_ROWS}")


def _are_rows(value: Any) -> bool:
    """Whether it holds rows in memory, as a `datasets.Dataset` or a table of pandas does."""
    return isinstance(value, Iterable) and not isinstance(value, str | list | dict)


def _streaming(settings: Settings) -> Outcomes:
    if not settings.get("streaming"):
        return
    share = settings.get("val_set_size")
    if isinstance(share, float) and 0 < share < 1:
        yield Refuse(
            "val_set_size", "a stream's length is not known; write a number of rows, or test_datasets"
        )
    if settings.get("dataset_exact_deduplication"):
        yield Refuse(
            "dataset_exact_deduplication", "all rows would have to be remembered; remove it, or streaming"
        )
    if settings.get("shuffle_merged_datasets") is False and "streaming_multipack_buffer_size" in settings:
        yield Refuse("streaming_multipack_buffer_size", "has no effect without shuffling; remove it")
    yield from _streaming_rhythm(settings)
    for key in ("dataset_prepared_path", "dataset_num_proc", "dataloader_num_workers"):
        if settings.get(key):
            yield Note(
                key, "only for evaluation data: streamed rows are read and tokenized as they are needed"
            )


def _streaming_rhythm(settings: Settings) -> Outcomes:
    for what in ("eval", "save"):
        if settings.get(f"{what}s_per_epoch"):
            yield Refuse(f"{what}s_per_epoch", f"a stream has no epochs; write {what}_steps")
    for key in ("eval_strategy", "evaluation_strategy", "save_strategy"):
        if settings.get(key) == "epoch":
            yield Refuse(key, f"a stream has no epochs; write {key[:4]}_steps, or remove it")


def _evaluation(settings: Settings) -> Outcomes:
    strategy = settings.get("eval_strategy", settings.get("evaluation_strategy"))
    evaluates = held_out(settings) and strategy not in ("no", False) and settings.get("evals_per_epoch") != 0
    for key in ("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model"):
        if settings.get(key) and not evaluates:
            yield Refuse(key, "needs evaluation; write val_set_size or test_datasets, or remove it")
    if settings.get("load_best_model_at_end"):
        if never := _saves_never(settings):
            yield Refuse("load_best_model_at_end", f"needs checkpoints; remove {never}")
        elif evaluates and not _saves_the_best(settings):
            yield Refuse(
                "load_best_model_at_end",
                "needs a checkpoint at every evaluation; save as often as you evaluate",
            )


def _saves_never(settings: Settings) -> str | None:
    """The setting by which no checkpoint is written, if there is one."""
    if settings.get("save_strategy") in ("no", False):
        return "save_strategy: no"
    return "saves_per_epoch: 0" if settings.get("saves_per_epoch") == 0 else None


def _saves_the_best(settings: Settings) -> bool:
    """Whether there is a checkpoint of each evaluation that is the best so far."""
    best = settings.get("save_strategy") == "best"
    return best or _rhythm(settings, "eval") == _rhythm(settings, "save")


def _rhythm(settings: Settings, what: str) -> tuple[Any, ...]:
    """How often something happens, comparable between evaluating and saving."""
    steps, per_epoch = settings.get(f"{what}_steps"), settings.get(f"{what}s_per_epoch")
    return (steps, per_epoch) if steps or per_epoch else ("epoch",)


def _distributed(settings: Settings) -> Outcomes:
    inside = settings.get("fsdp_config")
    version = inside.get("fsdp_version") if isinstance(inside, dict) else None
    outside = settings.get("fsdp_version")
    if outside is not None and version is not None and outside != version:
        yield Refuse(
            ("fsdp_config", "fsdp_version"), f"contradicts fsdp_version: {outside}; keep one of them"
        )
    if inside and outside is None and version != 2:
        yield Refuse("fsdp_config", "needs fsdp_version: 2 beside it; FSDP 1 is not offered")


def _templates(settings: Settings) -> Outcomes:
    name, text = settings.get("chat_template"), settings.get("chat_template_jinja")
    if name == "jinja" and not text:
        yield Refuse("chat_template", "jinja needs chat_template_jinja: the template's text, or a file")
    elif isinstance(name, str) and (why := objection(name)):
        yield Refuse("chat_template", why)
    if text and name not in (None, "jinja"):
        yield Refuse("chat_template_jinja", f"contradicts chat_template: {name}; write chat_template: jinja")


def _expressions(settings: Settings) -> Outcomes:
    """Regular expressions that are none, before the planner reads names with them."""
    for key in ("unfrozen_parameters", "lora_target_modules", "lora_rank_pattern", "lora_alpha_pattern"):
        value = settings.get(key)
        if key == "lora_target_modules" and not isinstance(value, str):
            continue  # a list holds names
        given = [value] if isinstance(value, str) else value
        for pattern in given if isinstance(given, list | dict) else ():
            try:
                re.compile(str(pattern))
            except re.error as error:
                yield Refuse(key, f"{pattern} is no regular expression: {error}")


def _leftovers(settings: Settings) -> Outcomes:
    for key in ("model_config", "overrides_of_model_config"):
        overrides = settings.get(key)
        if isinstance(overrides, dict) and "rope_scaling" in overrides:
            yield Refuse((key, "rope_scaling"), f"has another name since transformers 5; write {ROPE}")
    if settings.get("resume_from_checkpoint") is True:
        yield Refuse(
            "resume_from_checkpoint",
            "must be a checkpoint's folder; auto_resume_from_checkpoints: true takes the newest",
        )
    kwargs = settings.get("gradient_checkpointing_kwargs")
    for key in kwargs if isinstance(kwargs, dict) else ():
        if key not in _CHECKPOINTING:
            known = ", ".join(_CHECKPOINTING)
            yield Refuse(
                ("gradient_checkpointing_kwargs", key), f"torch has no such option; there are {known}"
            )
    if "gradient_checkpointing_kwargs" in settings and not settings.get("gradient_checkpointing"):
        yield Note("gradient_checkpointing_kwargs", "gradient_checkpointing is off")
    for key in ("hub_strategy", "hub_private_repo"):
        if key in settings and "hub_model_id" not in settings:
            yield Note(key, "nothing is pushed without hub_model_id")
