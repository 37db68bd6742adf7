"""Whether the groups that were read are what a method compares: how many completions, and with scores."""

import numpy as np

from fiducial.config.methods import MethodConfig
from fiducial.data.dataset import TokenizedDataset
from fiducial.data.prepare import PreparedData
from fiducial.errors import DataError


def require_groups(data: PreparedData, method: MethodConfig) -> None:
    """Raise `DataError` unless `method` can compare the groups of `data`, which are not single completions.

    Of streamed data the first groups are looked at: all rows of a dataset are read the same way.
    """
    for part in (data.sample, data.evaluation):
        if part is not None:
            _require_size(part, method, data)
            _require_scores(part, method)


def _require_size(groups: TokenizedDataset, method: MethodConfig, data: PreparedData) -> None:
    counts, wanted = groups.num_completions, method.num_completions
    if wanted is None or (counts == wanted).all():
        return
    wrong = counts[counts != wanted]
    read_as = ", ".join(sorted({f"{account.name} as {account.format}" for account in data.audit.datasets}))
    raise DataError(
        f"datasets: {len(wrong)} of {len(counts)} rows have {_count(wrong)} completions, and "
        f"{method.written()} compares {wanted} (read: {read_as}). {_remedy(wanted)}"
    )


def _count(counts: np.ndarray) -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def _remedy(wanted: int) -> str:
    if wanted == 2:
        return (
            "Write type: ranked.best_and_worst to compare the best completion with the worst, or rl: "
            "plackett_luce to learn from the whole ranking."
        )
    return f"Give rows with a list of {wanted} completions, best first (type: ranked)."


def _require_scores(groups: TokenizedDataset, method: MethodConfig) -> None:
    scored = groups.scores is not None and not np.isnan(groups.scores).any()
    if method.needs_scores and not scored:
        raise DataError(
            f"datasets: {method.written()} reads how good each completion is, and some rows do not say. Name "
            f"the columns: field_chosen_score and field_rejected_score for pairs, field_scores for lists."
        )
    if method.model_dump().get("offset_scale") == "log":
        _require_differences(groups, method)


def _require_differences(groups: TokenizedDataset, method: MethodConfig) -> None:
    scores = (groups[index].scores for index in range(len(groups)))
    equal = sum(better <= worse for better, worse in scores)
    if equal:
        raise DataError(
            f"datasets: {equal} of {len(groups)} pairs have equal scores, and {method.written()} takes the "
            f"logarithm of their difference. Leave such rows out, or write odpo_offset: identity."
        )
