"""Cutting the groups of one optimizer step into forward passes that fit in memory.

The gradient is a sum over the step's pairs, so where it is cut changes memory and speed, never the result.
Memory grows with the tokens a pass holds, which is why the budget is counted in tokens and not in pairs.
First the fewest passes are found, then the groups are dealt out among them evenly: a full pass and a small
rest would take the memory of a full one, and on a GPU a small pass costs the time of launching it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fiducial.data.batch import Layout
from fiducial.data.tokenize import TokenizedGroup


@dataclass(frozen=True, slots=True)
class Load:
    """What one forward pass would hold."""

    tokens: int = 0
    """Tokens with each prompt once."""
    rows: int = 0
    """Completions."""
    longest: int = 0
    """Tokens of the longest prompt + completion."""

    def add(self, group: TokenizedGroup) -> "Load":
        """The load with `group` in it."""
        rows = self.rows + len(group.completions)
        return Load(self.tokens + group.num_tokens, rows, max(self.longest, group.longest))

    @classmethod
    def of(cls, groups: Iterable[TokenizedGroup]) -> "Load":
        """The load of `groups` together."""
        load = cls()
        for group in groups:
            load = load.add(group)
        return load


Cost = Callable[[Load], int]

COSTS: dict[Layout, Cost] = {
    "packed": lambda load: load.tokens,
    "padded": lambda load: load.rows * load.longest,
}
"""Token positions a forward pass computes, by layout."""


def cut(
    groups: Sequence[TokenizedGroup], budget: int, *, cost: Cost = COSTS["packed"]
) -> list[list[TokenizedGroup]]:
    """Split `groups` into micro-batches of at most `budget` tokens; a group larger than that goes alone.

    First-fit decreasing: in the packed layout at most 11/9 of the fewest micro-batches possible, plus one; a
    pure function of its arguments. The costliest group comes first, so that too large a budget shows at once.
    """
    micro_batches: list[list[TokenizedGroup]] = []
    loads: list[Load] = []
    for group in sorted(groups, key=lambda group: cost(Load().add(group)), reverse=True):
        for index, load in enumerate(loads):
            grown = load.add(group)
            if cost(grown) <= budget:
                micro_batches[index].append(group)
                loads[index] = grown
                break
        else:
            micro_batches.append([group])
            loads.append(Load().add(group))
    return micro_batches


def leveled(
    micro_batches: Sequence[Sequence[TokenizedGroup]],
    passes: int,
    budget: int,
    *,
    cost: Cost = COSTS["packed"],
) -> list[list[TokenizedGroup]]:
    """The groups of `micro_batches` over `passes` passes, no fewer, whose largest is as small as can be.

    Each group goes, the costliest first, to the pass that holds least (Graham 1969: at most 4/3 of the
    smallest largest pass possible). Where that exceeds the budget, or costs more in all because short rows
    would be padded to long ones, the micro-batches stay as they are, with empty ones behind them.
    """
    groups = [group for micro_batch in micro_batches for group in micro_batch]
    parts: list[list[TokenizedGroup]] = [[] for _ in range(passes)]
    loads = [Load() for _ in parts]
    for group in sorted(groups, key=lambda group: cost(Load().add(group)), reverse=True):
        index = min(range(passes), key=lambda index: cost(loads[index]))
        parts[index].append(group)
        loads[index] = loads[index].add(group)
    fits = all(len(part) <= 1 or cost(load) <= budget for part, load in zip(parts, loads, strict=True))
    before = sum(cost(Load.of(micro_batch)) for micro_batch in micro_batches)
    if not fits or sum(map(cost, loads)) > before:
        return [*map(list, micro_batches), *([] for _ in range(passes - len(micro_batches)))]
    return [parts[index] for index in sorted(range(passes), key=lambda index: -cost(loads[index]))]


def largest(micro_batches: Sequence[Sequence[TokenizedGroup]], *, cost: Cost) -> int:
    """Tokens of the costliest micro-batch."""
    return max((cost(Load.of(micro_batch)) for micro_batch in micro_batches), default=0)
