"""Keys that say which policy is the reference, when it is scored, and whether it moves."""

from typing import Any

from fiducial.config.method_keys import why_no_reference
from fiducial.config.outcomes import Note, Outcomes, Put, Refuse, Settings


def reference(settings: Settings) -> Outcomes:
    """Which policy is the reference, and when it is scored."""
    block = settings.get("reference", {})
    if not isinstance(block, dict):
        yield Refuse("reference", "must be a mapping, for example reference: {source: separate_model}")
        return
    yield from (Put(f"reference.{field}", value, ("reference", field)) for field, value in block.items())
    yield from _separate_copy(settings, block)
    yield from _schedule(settings.get("precompute_ref_log_probs"), block)
    yield from _sync(settings.get("trl"), block)


def _separate_copy(settings: Settings, block: dict[str, Any]) -> Outcomes:
    """A second model instead of the adapter switched off; harmless where there is neither."""
    key = "rl_adapter_ref_model"
    copy = settings.get(key, False)
    if not isinstance(copy, bool):
        yield Refuse(key, "must be true or false")
    elif copy and (why := why_no_reference(settings)):
        yield Note(key, f"asks for nothing: {why}")
    elif copy and settings.get("adapter") is None:
        yield Note(key, "asks for what is so anyway: there is no adapter to switch off")
    elif copy and block.get("source", "separate_model") != "separate_model":
        yield Refuse(key, f"contradicts reference.source: {block['source']}; keep one of them")
    elif copy:
        yield Put("reference.source", "separate_model", key)


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


_SYNC = {"ref_model_sync_steps": ("sync_steps", 64), "ref_model_mixup_alpha": ("mixup_alpha", 0.9)}
"""Key inside `trl` to ours, and the value that stands there in configs that do not sync."""


def _sync(trl: Any, block: dict[str, Any]) -> Outcomes:
    """A reference that moves towards the policy (TR-DPO)."""
    given = trl if isinstance(trl, dict) else {}
    switch = given.get("sync_ref_model", False)
    synced = switch or block.get("schedule") == "synced"
    if not isinstance(switch, bool):
        yield Refuse(("trl", "sync_ref_model"), "must be true or false")
    elif switch and block.get("schedule", "synced") != "synced":
        yield Refuse(
            ("trl", "sync_ref_model"),
            f"contradicts reference.schedule: {block['schedule']}; keep one of them",
        )
    elif switch:
        yield Put("reference.schedule", "synced", ("trl", "sync_ref_model"))
    for name, (field, default) in _SYNC.items():
        value = given.get(name)
        if not synced and field in block:
            yield Refuse(("reference", field), "has no effect without schedule: synced; remove it")
        if value is not None and synced and field in block:
            yield Refuse(("trl", name), f"means the same as reference.{field}; keep one of them")
        elif value is not None and synced:
            yield Put(f"reference.{field}", value, ("trl", name))
        elif value is not None:
            yield _idle(name, value, default)


def _idle(name: str, value: Any, default: Any) -> Refuse | Note:
    """A setting of a sync that is off; its default stands in many configs."""
    if value == default:
        return Note(("trl", name), "belongs to sync_ref_model, which is off")
    return Refuse(("trl", name), "has no effect without sync_ref_model: true; remove it")
