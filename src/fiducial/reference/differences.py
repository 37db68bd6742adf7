"""Why two references are not the same one, in words. Imports no torch: a manifest is plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Manifest = Mapping[str, Any]

_WORDS = {
    "weights": "the weights",
    "dtype": "the weights' precision",
    "autocast": "the precision of the products (bf16, fp16)",
    "matmul": "how float32 products are made (tf32)",
    "scoring": "the version of the scoring path",
    "format": "the format of the records",
}
"""What an identity is made of, for people."""
_SHOWN = 3
Places = tuple[str, str]
_HERE: Places = ("here", "there")
_NOW: Places = ("now", "then")


def differences(wanted: Manifest, found: Manifest) -> list[str]:
    """What is another in `found` than in `wanted`, a phrase each; empty for the same reference."""
    phrases = []
    for name, words in _WORDS.items():
        if found.get(name) == wanted.get(name):
            continue
        if name == "weights":
            here, there = wanted.get("fingerprint"), found.get("fingerprint")
            phrases += [*_settings(here, there, _HERE), *_tensors(here, there, _HERE)]
        else:
            phrases.append(f"{words}: {found.get(name)} there, {wanted.get(name)} here")
    return phrases


@dataclass(frozen=True, slots=True)
class Changes:
    """What has become of one reference in the course of time, a phrase each."""

    another: tuple[str, ...]
    """It is another policy now."""
    computed: tuple[str, ...]
    """It is the same policy, computed in another way or by other software."""


def changes(then: Manifest, now: Manifest) -> Changes:
    """What is another `now` than `then`.

    A setting of the config that only one of them has is the library's: a later version knows more of them.
    """
    before, after = then.get("fingerprint"), now.get("fingerprint")
    another = _tensors(after, before, _NOW) if then["weights"] != now["weights"] else []
    if then["dtype"] != now["dtype"]:  # every weight is another one then, and that says less
        another = [f"{_WORDS['dtype']}: {then['dtype']} then, {now['dtype']} now"]
    library = []
    if before and after:
        one, other = before["settings"], after["settings"]
        shared = one.keys() & other.keys()
        both = (
            each | {"settings": {name: each["settings"][name] for name in shared}} for each in (after, before)
        )
        another += _settings(next(both), next(both), _NOW)
        library = [f"{name} of the config is known only then" for name in sorted(one.keys() - shared)]
        library += [f"{name} of the config is known only now" for name in sorted(other.keys() - shared)]
    computed = [
        f"{words}: {then.get(name)} then, {now.get(name)} now"
        for name, words in _WORDS.items()
        if name not in ("weights", "dtype") and then.get(name) != now.get(name)
    ]
    return Changes(tuple(another), tuple(computed + library))


def _tensors(wanted: Manifest | None, found: Manifest | None, places: Places) -> list[str]:
    """Which weights differ, where both manifests know them one by one."""
    if not wanted or not found:
        return ["the weights differ"]
    here, there = wanted["tensors"], found["tensors"]
    changed = [name for name in here if name in there and here[name] != there[name]]
    return [
        f"{len(names)} of {len(among)} weights {verb} ({_some(names)})"
        for names, among, verb in (
            (changed, here, "differ"),
            ([name for name in here if name not in there], here, f"are only {places[0]}"),
            ([name for name in there if name not in here], there, f"are only {places[1]}"),
        )
        if names
    ]


def _settings(wanted: Manifest | None, found: Manifest | None, places: Places) -> list[str]:
    if not wanted or not found:
        return []
    here, there = wanted["settings"], found["settings"]
    names = [name for name in sorted(set(here) | set(there)) if here.get(name) != there.get(name)]
    owner = "config" if wanted["tensors"] or found["tensors"] else "server"
    return [
        f"{name} of the {owner}: {_short(there.get(name))} {places[1]}, {_short(here.get(name))} {places[0]}"
        for name in names
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
