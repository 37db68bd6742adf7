"""Do policy and reference read the same token ids? Decided from tokenizer files, without torch.

The data is tokenized once, by the policy's tokenizer, and both models score those ids. So every id must stand
for the same token in both; how each would split text is another matter.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fiducial.config.schema import RunConfig
from fiducial.errors import ModelError, PlanError
from fiducial.reference.checkpoint import CheckpointFiles

Vocabulary = Mapping[str, int]
"""Token to id."""

_SHOWN = 3


def read_vocabulary(files: CheckpointFiles) -> Vocabulary | None:
    """The vocabulary of the tokenizer in `files`, as far as its files say it in JSON or plain text.

    None where there is no such file here (a hub checkpoint that is not cached, a bare sentencepiece model).

    Raises:
        ModelError: A file is damaged.
    """
    whole = files.find("tokenizer.json")
    if whole is not None:
        return _from_whole(whole, files.key)
    pieces = files.find("vocab.json")
    if pieces is not None:
        added = files.find("added_tokens.json")
        return _object(pieces, files.key) | (_object(added, files.key) if added is not None else {})
    lines = files.find("vocab.txt")
    if lines is not None:
        return {token: number for number, token in enumerate(lines.read_text(encoding="utf-8").splitlines())}
    return None


def with_tokens(vocabulary: Vocabulary, tokens: tuple[str, ...]) -> Vocabulary:
    """The vocabulary when a run has added `tokens`: new ones take the next ids."""
    grown = dict(vocabulary)
    following = max(grown.values(), default=-1) + 1
    for token in tokens:
        if token not in grown:
            grown[token] = following
            following += 1
    return grown


def vocabulary_difference(policy: Vocabulary, reference: Vocabulary) -> str | None:
    """Which tokens differ, how many, with a few examples; None where every id stands for the same token."""
    moved = [token for token, number in policy.items() if reference.get(token, number) != number]
    parts = [
        _some(
            moved, "has another id there", lambda token: f"{token!r} {policy[token]} and {reference[token]}"
        ),
        _some([token for token in policy if token not in reference], "is only in the policy's", repr),
        _some([token for token in reference if token not in policy], "is only in the reference's", repr),
    ]
    return "; ".join(part for part in parts if part) or None


def different_vocabulary(name: str, difference: str) -> str:
    """The message for a reference that reads other token ids than the policy."""
    return (
        f"reference.model: {name} has another vocabulary than the policy: {difference}. Both score the same "
        "token ids, so every id must be the same token. Name a checkpoint with the policy's tokenizer; a "
        "token that only the reference has can be added to the policy with tokens: [...]."
    )


def refuse_other_rows(cfg: RunConfig, policy_rows: int, reference_rows: int) -> None:
    """Refuse distributions of two lengths where the loss compares them.

    Raises:
        PlanError: The loss reads whole distributions, and the two models have other numbers of logits.
    """
    if cfg.method is not None and cfg.method.needs_distribution and policy_rows != reference_rows:
        raise PlanError(
            f"reference.model: {cfg.reference.model} gives {reference_rows} logits a token and the policy "
            f"{policy_rows}, and {cfg.method.written()} compares them one by one. Name a reference with the "
            "policy's vocabulary size, or write rl: dpo, which compares log-probs of the data alone."
        )


def _from_whole(path: Path, key: str) -> Vocabulary:
    content = _object(path, key)
    held: Any = (content.get("model") or {}).get("vocab") or {}
    try:
        # Unigram models keep a list of token and score, others a mapping.
        found = (
            {piece[0]: number for number, piece in enumerate(held)} if isinstance(held, list) else dict(held)
        )
        for added in content.get("added_tokens") or ():
            found[added["content"]] = added["id"]
    except (KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{key}: {path} is not a tokenizer's file. Download it again.") from error
    return found


def _object(path: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{key}: {path} is not JSON ({error}). Download the checkpoint again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{key}: {path} does not hold a JSON object. Download the checkpoint again.")
    return content


def _some(tokens: list[str], what: str, show: Any) -> str | None:
    if not tokens:
        return None
    examples = ", ".join(show(token) for token in tokens[:_SHOWN])
    more = ", …" if len(tokens) > _SHOWN else ""
    noun = "token" if len(tokens) == 1 else "tokens"
    verb = what if len(tokens) == 1 else what.replace("has", "have").replace("is ", "are ")
    return f"{len(tokens)} {noun} {verb} ({examples}{more})"
