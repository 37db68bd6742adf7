"""The chunked head against all logits at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from fiducial.model import head
from fiducial.model.head import token_logps
from fiducial.model.logit_rule import LogitRule

SCORED, WIDTH, VOCAB = 7, 6, 23


def _inputs(
    *, scored: int = SCORED, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(scored, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(VOCAB, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(VOCAB, (scored,), generator=generator)
    return hidden, weight, bias, targets


def _gradients(logps: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, logps.numel(), dtype=logps.dtype)
    return [logps, *torch.autograd.grad((logps * weights).sum(), inputs)]


def _assert_close(ours: list[Tensor], naive: list[Tensor], tolerance: float = 1e-12) -> None:
    for left, right in zip(ours, naive, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@pytest.fixture(params=[0, 500, 2**20], ids=["recomputed", "some kept", "all kept"])
def _kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "KEPT_BYTES", dict.fromkeys(head.KEPT_BYTES, request.param))


@pytest.mark.usefixtures("_kept")
@pytest.mark.parametrize("chunk", [1, 3, VOCAB, VOCAB + 9])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 1.0), (None, 0.25), (2.0, 3.0)])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_all_logits_at_once(chunk: int, softcap: float | None, scale: float, biased: bool) -> None:
    hidden, weight, bias, targets = _inputs()
    inputs = [hidden, weight, *([bias] if biased else [])]
    given = bias if biased else None
    ours = token_logps(hidden, weight, targets, bias=given, rule=LogitRule(scale, softcap), chunk=chunk)
    naive = oracles.head_logps(hidden, weight, targets, given, softcap, scale)
    _assert_close(_gradients(ours, inputs), _gradients(naive, inputs))


@pytest.mark.parametrize("chunk", [1, 3, VOCAB + 9])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 3.0)])
def test_a_frozen_head_needs_no_second_look(
    chunk: int, softcap: float | None, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, targets = _inputs()
    weight, bias = weight.detach(), bias.detach()
    ours = token_logps(hidden, weight, targets, bias=bias, rule=LogitRule(scale, softcap), chunk=chunk)
    naive = oracles.head_logps(hidden, weight, targets, bias, softcap, scale)
    monkeypatch.delattr(head._Head, "_chunks")  # backward must not walk the vocabulary
    _assert_close(_gradients(ours, [hidden]), _gradients(naive, [hidden]))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_needed_gradients_are_computed(frozen: int) -> None:
    hidden, weight, bias, targets = _inputs()
    (hidden, weight, bias)[frozen].requires_grad_(False)
    trained = [tensor for tensor in (hidden, weight, bias) if tensor.requires_grad]
    ours = token_logps(hidden, weight, targets, bias=bias, chunk=4)
    naive = oracles.head_logps(hidden, weight, targets, bias, None, 1.0)
    _assert_close(_gradients(ours, trained), _gradients(naive, trained))


def test_a_tied_weight_gets_both_gradients() -> None:
    hidden, weight, _, targets = _inputs()

    def total(score: Callable[[Tensor], Tensor]) -> Tensor:
        embedded = hidden + weight[targets]
        return torch.autograd.grad(score(embedded).sum(), weight)[0]

    ours = total(lambda embedded: token_logps(embedded, weight, targets, chunk=5))
    naive = total(lambda embedded: oracles.head_logps(embedded, weight, targets, None, None, 1.0))
    _assert_close([ours], [naive])


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_scored_is_an_empty_result_with_zero_gradient(frozen: bool) -> None:
    hidden, weight, _, targets = _inputs(scored=0)
    weight.requires_grad_(not frozen)
    logps = token_logps(hidden, weight, targets)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad is not None
    assert frozen or (weight.grad is not None and not weight.grad.any())


def test_many_tokens_are_scored_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_MAX_TOKENS", 3)
    hidden, weight, _, targets = _inputs()
    ours = token_logps(hidden, weight, targets)
    naive = oracles.head_logps(hidden, weight, targets, None, None, 1.0)
    _assert_close(_gradients(ours, [hidden, weight]), _gradients(naive, [hidden, weight]))


def spied_looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each chunk that is looked at, whether shares are asked for."""
    looked: list[bool] = []
    look = head._Head._look

    def spy(self: Any, *chunk: Any, shares: bool) -> Any:
        looked.append(shares)
        return look(self, *chunk, shares=shares)

    monkeypatch.setattr(head._Head, "_look", spy)
    return looked


def test_without_gradient_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = _inputs()
    monkeypatch.delattr(head._TokenLogps, "forward")
    looked = spied_looks(monkeypatch)
    with torch.no_grad():
        logps = token_logps(hidden, weight, targets)
    assert not logps.requires_grad
    assert looked == [False], "shares serve gradients alone"
    _assert_close([logps], [oracles.head_logps(hidden, weight, targets, None, None, 1.0)])


@pytest.mark.parametrize(
    ("kept", "looks"),
    [(0, [False] * 3 + [True] * 3), (2**20, [True] * 3), (500, [True, False, False] + [True] * 2)],
)
def test_what_is_kept_is_looked_at_once(
    kept: int, looks: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "KEPT_BYTES", dict.fromkeys(head.KEPT_BYTES, kept))
    hidden, weight, _, targets = _inputs()
    looked = spied_looks(monkeypatch)
    token_logps(hidden, weight, targets, chunk=8).sum().backward()
    assert looked == looks


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_errs_no_more_than_naive_autocast(frozen: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 48, generator=generator)
    weight = torch.randn(300, 48, generator=generator) / 5
    targets = torch.randint(300, (64,), generator=generator)

    def run(score: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen)]
        return _gradients(score(*inputs), [tensor for tensor in inputs if tensor.requires_grad])

    def naive(h: Tensor, w: Tensor) -> Tensor:
        return oracles.head_logps(h, w, targets, None, None, 1.0)

    truth = run(naive, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(naive, torch.float32)
        ours = run(lambda h, w: token_logps(h, w, targets, chunk=32), torch.float32)
    for value, simple, right in zip(ours, rounded, truth, strict=True):
        assert value.dtype == torch.float32
        allowed = 1.5 * (simple - right).norm()
        assert (value - right).norm() <= allowed


def test_products_run_in_autocasts_precision_and_sums_in_float32() -> None:
    hidden, weight, _, targets = _inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_logps(hidden, weight, targets, chunk=5)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    naive = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    _assert_close([ours], [naive], tolerance=1e-5)


def test_another_target_is_another_number() -> None:
    hidden, weight, _, targets = _inputs()
    ours = token_logps(hidden, weight, (targets + 1) % VOCAB)
    naive = oracles.head_logps(hidden, weight, targets, None, None, 1.0)
    assert (ours - naive).abs().max() > 0.1
