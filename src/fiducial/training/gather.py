"""What every process must know of all others' log-probs: for losses that read a whole optimizer step."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from fiducial.logps import Comparison, Completions, SequenceLogps
from fiducial.processes import num_processes, rank


def gather_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """The numbers of every process, process by process."""
    if num_processes() == 1:
        return [list(numbers)]
    own = torch.tensor(numbers, device=device)
    rows = [torch.empty_like(own) for _ in range(num_processes())]
    dist.all_gather(rows, own)
    table: list[list[int]] = torch.stack(rows).tolist()
    return table


def gather_mean(values: Sequence[float], device: torch.device) -> float:
    """Mean over the values of all processes; 0 where there are none."""
    total, count = float(sum(values)), len(values)
    if num_processes() > 1:
        totals = torch.tensor([total, count], dtype=torch.float32, device=device)
        dist.all_reduce(totals)
        total, count = totals.tolist()
    return total / count if count else 0.0


def gather_comparisons(parts: Sequence[Comparison]) -> tuple[list[Comparison], slice]:
    """The forward passes of all processes, process by process, and which of them are this one's.

    Every process has equally many, some of which may be empty. What arrives has no gradient.
    """
    if num_processes() == 1:
        return list(parts), slice(0, len(parts))
    sizes = gather_numbers([len(part.policy.sum) for part in parts], parts[0].policy.sum.device)
    table = torch.cat([_as_table(part) for part in parts])
    most = max(map(sum, sizes))
    padded = table.new_zeros(most, table.shape[1])
    padded[: len(table)] = table
    tables = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(tables, padded)
    everyone = [
        _from_table(piece, parts[0])
        for size, whole in zip(sizes, tables, strict=True)
        for piece in torch.split(whole[: sum(size)], size)
    ]
    first = rank() * len(parts)
    return everyone, slice(first, first + len(parts))


def _as_table(part: Comparison) -> Tensor:
    """One row a sequence, one column a quantity. float64 holds each of them exactly."""
    policy, reference, completions = part.policy, part.reference, part.completions
    columns = [policy.sum, policy.num_tokens, completions.group, completions.score]
    columns += [policy.statistics[name] for name in sorted(policy.statistics)]
    if reference is not None:
        columns += [reference.sum, *(reference.statistics[name] for name in sorted(reference.statistics))]
    return torch.stack([column.detach().double() for column in columns], 1)


def _from_table(table: Tensor, like: Comparison) -> Comparison:
    columns = iter(table.unbind(1))

    def logps(model: SequenceLogps, num_tokens: Tensor, total: Tensor) -> SequenceLogps:
        statistics = {name: next(columns).to(model.sum.dtype) for name in sorted(model.statistics)}
        return SequenceLogps(total.to(model.sum.dtype), num_tokens, statistics)

    total, num_tokens = next(columns), next(columns).long()
    completions = Completions.of(next(columns).long(), next(columns).float())
    policy = logps(like.policy, num_tokens, total)
    reference = like.reference
    if reference is not None:
        reference = logps(reference, num_tokens, next(columns))
    return Comparison(policy, reference, completions)
