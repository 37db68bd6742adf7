"""The benchmark's own arithmetic: what it counts, compares and refuses. Nothing is measured here."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import cuda, shapes, tables, workload
from bench.arena import DisagreementError, agree, figures
from bench.contestant import Result
from bench.profile import category
from bench.workload import Pair, Workload
from transformers import LlamaForCausalLM

STEP = {"loss": 0.69, "rewards/chosen": 0.1, "rewards/rejected": 0.0, "rewards/margins": 0.1}
RESULT = Result(
    step_seconds=[9.0, 2.0, 2.0], scoring_seconds=3.0, peak_bytes_above_weights=8, logs=[STEP, STEP]
)
PRODUCTS = shapes.Cost(body=((2, 3), (3, 2)), head=(2, 10), query_width=5)


def pairs(*lengths: tuple[int, int, int]) -> list[Pair]:
    return [Pair([1] * prompt, [2] * chosen, [3] * rejected) for prompt, chosen, rejected in lengths]


def test_padding_counts_two_rows_a_pair_as_long_as_the_batch_s_longest() -> None:
    batch = pairs((2, 3, 1), (1, 1, 1), (4, 4, 4), (1, 1, 1))
    assert workload.padded_tokens(batch, 2) == (4 * 5 + 4 * 8) / 4


@pytest.mark.parametrize("name", ["long", "hh"])
def test_a_few_pairs_have_the_lengths_and_the_padding_of_the_whole_set(name: str) -> None:
    made = workload.make(name, generated=True, vocab_size=100, max_length=2048, warmup=1, steps=4)
    sample, whole = workload.statistics(made.measured), made.population
    assert len(made.pairs) == 5 * made.batch_size
    assert sample["shared_tokens"] == pytest.approx(whole["shared_tokens"], rel=0.1)
    padding = workload.padded_tokens(made.measured, made.batch_size)
    assert padding == pytest.approx(whole["padded_tokens"], rel=0.02)
    assert max(pair.longest for pair in made.pairs) <= 2048


def test_products_are_every_weight_matrix_of_the_model() -> None:
    config = shapes.config("42M", longest=16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    products = shapes.cost(config)
    assert sum(rows * columns for rows, columns in products.body) == matrices
    assert products.forward(3, 2) == 2 * (3 * matrices + 2 * config.vocab_size * config.hidden_size)
    assert 41e6 < sum(p.numel() for p in model.parameters()) < 43e6


def test_figures_leave_warm_up_out_and_charge_the_measured_pairs_their_share_of_scoring() -> None:
    work = Workload("x", 2, 1, 99, pairs(*[(1, 1, 1)] * 6), {})
    row = figures(RESULT, work, PRODUCTS, rate=1000.0)
    assert row["training_pairs_per_second"] == 4 / 4.0
    assert row["pairs_per_second"] == 4 / (4.0 + 3.0 * 4 / 6)
    assert row["scoring_over_training"] == 0.5
    products = 3 * 2 * (12 * 12 + 20 * 8)
    assert row["share_of_matrix_rate"] == products / 4.0 / 1000.0
    seen = 4 * (1 + 2 + 2)  # prompt sees 1 key, each completion's token 2
    assert row["share_with_attention"] == (products + 3 * 4 * 5 * seen) / 4.0 / 1000.0


def test_equal_steps_agree() -> None:
    agree("ours", RESULT, RESULT)


@pytest.mark.parametrize("wrong", [0.6902, math.nan])
def test_a_different_loss_is_refused(wrong: float) -> None:
    other = replace(RESULT, logs=[STEP, STEP | {"loss": wrong}])
    with pytest.raises(DisagreementError, match=r"step 2: loss is .* in ours, 0.69 in TRL"):
        agree("ours", other, RESULT)


@pytest.mark.parametrize(("reward", "agrees"), [(-5.0004, True), (-5.0006, False)])
def test_a_large_rewards_tolerance_grows_with_it(reward: float, agrees: bool) -> None:
    expected, ours = (
        replace(RESULT, logs=[STEP, STEP | {"rewards/rejected": value}]) for value in (-5.0, reward)
    )
    if agrees:
        agree("ours", ours, expected)
    else:
        with pytest.raises(DisagreementError, match="rewards/rejected"):
            agree("ours", ours, expected)


def test_missing_steps_are_refused() -> None:
    with pytest.raises(DisagreementError, match="logged 1 steps, TRL 2"):
        agree("ours", replace(RESULT, logs=[STEP]), RESULT)


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (["aten::linear", "aten::mm"], "body: products"),
        (["_TokenLogpsBackward", "aten::mm"], "head: products"),
        (["TokenLogps", "aten::exp_"], "head: softmax, chunks"),
        (["_BlockAttention", "aten::bmm"], "attention"),
        (["Optimizer.step#AdamW.step", "aten::_fused_adamw_"], "optimizer and clipping"),
        (["aten::to", "aten::copy_"], "copies, casts, fills"),
        (["aten::silu"], "norms, activations, rotary, other element-wise"),
    ],
)
def test_an_operation_belongs_where_its_callers_say(chain: list[str], expected: str) -> None:
    assert category(chain) == expected


def test_without_a_gpu_the_cuda_program_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.main([]) == cuda.NO_DEVICE
    assert "needs a CUDA device" in capsys.readouterr().out


def test_the_page_says_what_the_results_say() -> None:
    page = tables.PAGE.read_text()
    assert tables.page(page) == page, "run `python bench/tables.py`"


def test_a_table_s_ratios_are_to_its_first_row(tmp_path: Path) -> None:
    row = figures(RESULT, Workload("x", 2, 1, 99, pairs(*[(1, 1, 1)] * 6), {}), PRODUCTS, rate=1000.0)
    faster = row | {"pairs_per_second": 3 * row["pairs_per_second"]}
    facts = {"shared_tokens": 3.0, "padded_tokens": 4.0}
    comparison = {"data": "x", "precision": "float32", "batch_size": 2, "matrix_rate": 1e9, "pairs": facts}
    versions = {"torch": "2", "transformers": "5", "trl": "1"}
    report = {"command": "c", "machine": {"cpu": "z", "cores": 2}, "versions": versions, "shape": "42M"}
    report["comparisons"] = [comparison | {"contestants": {"TRL": row, "Fiducial": faster}}]
    (tmp_path / "results.json").write_text(json.dumps(report))
    page = tables.page("before\n<!-- results -->\nold\n<!-- end -->\nafter\n", tmp_path)
    assert "| Fiducial | 2 | 3.0× | 1 | 1.0× |" in page
    assert "old" not in page
    assert page.startswith("before")
    assert page.endswith("after\n")
