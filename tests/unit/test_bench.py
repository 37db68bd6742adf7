"""The benchmark's own arithmetic: what it counts, compares and refuses. Nothing is measured here."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import cache, cuda, results, shapes, tables, texts, workload
from bench.agreement import DisagreementError, agree
from bench.arena import figures
from bench.contestant import Result
from bench.methods import METHODS
from bench.profile import category
from bench.results import Results
from bench.workload import DATA, Example, Workload
from rich.console import Console
from transformers import LlamaForCausalLM

from fiducial.train import train

STEP = {"loss": 0.69, "rewards/chosen": 0.1, "rewards/rejected": 0.0, "rewards/margins": 0.1}
RESULT = Result(
    step_seconds=[9.0, 2.0, 2.0], scoring_seconds=2.0, peak_bytes_above_weights=8, logs=[STEP, STEP]
)
PRODUCTS = shapes.Cost(body=((2, 3), (3, 2)), head=(2, 10), query_width=5)


def pairs(*lengths: tuple[int, int, int]) -> list[Example]:
    return [Example([1] * prompt, [[2] * chosen, [3] * rejected]) for prompt, chosen, rejected in lengths]


def labelled(*lengths: tuple[int, int, int]) -> list[Example]:
    return [Example([1] * prompt, [[2] * own], True, [3] * other) for prompt, own, other in lengths]


def six_pairs() -> Workload:
    return Workload("x", 2, 1, 99, pairs(*[(1, 1, 1)] * 6), {})


def test_padding_counts_two_rows_a_pair_as_long_as_the_batch_s_longest() -> None:
    batch = pairs((2, 3, 1), (1, 1, 1), (4, 4, 4), (1, 1, 1))
    assert workload.padded_tokens(batch, 2) == (4 * 5 + 4 * 8) / 4


def test_padding_of_labelled_completions_counts_the_mismatched_rows_too() -> None:
    batch = labelled((2, 3, 1), (1, 1, 1))
    assert workload.padded_tokens(batch, 2) == (2 * 5 + 2 * 3) / 2


def test_waste_is_padding_and_prompts_that_come_again() -> None:
    found = workload.waste(pairs((2, 3, 1), (1, 1, 1)), 2)
    assert found == {"padding": 1 - 12 / 20, "repeated_prompts": 3 / 20}
    found = workload.waste(labelled((2, 3, 1), (1, 1, 1)), 2)
    assert found == {"padding": 1 - 12 / 16, "repeated_prompts": 3 / 16}


def test_each_labelled_completion_is_mismatched_with_the_one_before_it_in_its_batch() -> None:
    made = workload.make("kto", generated=True, vocab_size=100, max_length=300, warmup=1, steps=1)
    for batch in (made.examples[:8], made.measured):
        for index, example in enumerate(batch):
            room = 300 - len(example.prompt)
            assert example.mismatched == batch[index - 1].completions[0][:room]
    assert {example.desirable for example in made.examples} == {True, False}


def test_real_labelled_completions_end_a_conversation(shared_data: Path) -> None:
    rows = texts.read("kto")
    assert len(rows) == 300
    assert sum(row.desirable is True for row in rows) == 150
    assert all(len(row.completions) == 1 and row.prompt.startswith("user: ") for row in rows)


@pytest.mark.parametrize("name", sorted(DATA))
def test_a_few_examples_have_the_lengths_and_the_padding_of_the_whole_set(name: str) -> None:
    made = workload.make(name, generated=True, vocab_size=100, max_length=2048, warmup=1, steps=4)
    sample, whole = workload.statistics(made.measured), made.population
    assert len(made.examples) == 5 * made.batch_size
    assert sample["shared_tokens"] == pytest.approx(whole["shared_tokens"], rel=0.1)
    padding = workload.padded_tokens(made.measured, made.batch_size)
    assert padding == pytest.approx(whole["padded_tokens"], rel=0.02)
    assert max(pair.longest for pair in made.examples) <= 2048


def test_a_small_vocabulary_is_given_tokens_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "read", lambda name: pytest.fail("its tokens do not fit"))
    vocab_size = shapes.SHAPES["tiny"]["vocab_size"]
    made = workload.make(
        "hh", generated=False, vocab_size=vocab_size, max_length=300, warmup=0, steps=1, batch_size=4
    )
    assert made.name == "hh (generated)"
    ids = [token for each in made.examples for part in (each.prompt, *each.completions) for token in part]
    assert max(ids) < vocab_size


def test_products_are_every_weight_matrix_of_the_model() -> None:
    config = shapes.config("42M", longest=16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    products = shapes.cost(config)
    assert sum(rows * columns for rows, columns in products.body) == matrices
    assert products.forward(3, 2) == 2 * (3 * matrices + 2 * config.vocab_size * config.hidden_size)
    assert 41e6 < sum(p.numel() for p in model.parameters()) < 43e6


def test_figures_leave_warm_up_out() -> None:
    row = figures(RESULT, six_pairs(), PRODUCTS, rate=1000.0)
    assert row["training_per_second"] == 4 / 4.0
    assert row["per_second"] == 4 / (4.0 + 2.0)
    assert row["scoring_over_training"] == 0.5
    products = 3 * 2 * (12 * 12 + 20 * 8)
    assert row["share_of_matrix_rate"] == products / 4.0 / 1000.0
    seen = 4 * (1 + 2 + 2)  # prompt sees 1 key, each completion's token 2
    assert row["share_with_attention"] == (products + 3 * 4 * 5 * seen) / 4.0 / 1000.0


def test_figures_count_a_mismatched_completion_s_forward_pass() -> None:
    work = Workload("x", 2, 1, 99, labelled(*[(1, 1, 1)] * 6), {})
    row = figures(RESULT, work, PRODUCTS, rate=1000.0)
    products = 3 * 2 * (12 * 8 + 20 * 4) + 2 * (12 * 4 + 20 * 4)
    assert row["share_of_matrix_rate"] == products / 4.0 / 1000.0
    seen = 4 * (3 * (1 + 2) + 2)  # prompt and completion forward and backward, the mismatched one forward
    assert row["share_with_attention"] == (products + 4 * 5 * seen) / 4.0 / 1000.0


def test_equal_steps_agree() -> None:
    agree("ours", RESULT, RESULT)


def test_a_step_without_rejected_completions_agrees_only_if_neither_has_any() -> None:
    desirable = {key: value for key, value in STEP.items() if key in ("loss", "rewards/chosen")}
    bare = replace(RESULT, logs=[desirable, STEP])
    agree("ours", bare, bare)
    with pytest.raises(DisagreementError, match="rewards/rejected is None in ours"):
        agree("ours", bare, RESULT)


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


def test_the_pages_say_what_the_results_say() -> None:
    for path, text in tables.made().items():
        assert path.read_text() == text, "run `python bench/tables.py`"


def test_ratios_of_two_passes_to_one_are_a_row_each() -> None:
    row = {"case": "half frozen", "tokens": 1536, "wall": 1.254, "processor": 1.2}
    report = {
        "command": "python bench/one_pass.py",
        "machine": {"cpu": "x", "cores": 2},
        "versions": dict.fromkeys(("torch", "transformers", "trl"), "1"),
        "shape": "42M",
        "shared_layers": [row],
        "sharded": [row | {"case": "sharded"}],
        "offloaded": [row | {"case": "offloaded"}],
        "quantised": [row | {"case": "4-bit"}],
    }
    text = tables.tables(report)
    assert (
        "| sharded | 1,536 | 1.25× | 1.20× |" in text.split("gathered once for both")[1].split("at most")[0]
    )
    assert (
        "| offloaded | 1,536 | 1.25× | 1.20× |" in text.split("copied once for both")[1].split("at most")[0]
    )
    assert "| half frozen | 1,536 | 1.25× | 1.20× |" in text.split("at most")[0]
    assert "| 4-bit | 1,536 | 1.25× | 1.20× |" in text.split("at most")[1]


def comparison(method: str = "dpo", precision: str = "float32") -> dict[str, object]:
    row = figures(RESULT, six_pairs(), PRODUCTS, rate=1000.0)
    facts = {"shared_tokens": 3.0, "padded_tokens": 4.0}
    return {
        **{"method": method, "data": "x", "unit": "pairs", "precision": precision, "batch_size": 2},
        **{
            "matrix_rate": 1e9,
            "torch_matrix_rate": 5e8,
            "examples": facts,
            "waste": {"padding": 0.25, "repeated_prompts": 0.1},
        },
        "contestants": {
            "TRL default": row,
            "TRL precomputed": row | {"per_second": 2 * row["per_second"]},
            "Fiducial": row | {"per_second": 3 * row["per_second"], "peak_bytes_above_weights": 2},
        },
    }


def report(*comparisons: dict[str, object]) -> dict[str, object]:
    versions = {"torch": "2", "transformers": "5", "trl": "1"}
    made = {"command": "c", "machine": {"cpu": "z", "cores": 2}, "versions": versions, "shape": "42M"}
    return made | {"comparisons": list(comparisons)}


def test_a_comparison_is_a_row_with_its_ratios_to_trl_s_default_and_best(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(report(comparison())))
    page = tables.page("before\n<!-- results -->\nold\n<!-- end -->\nafter\n", results=tmp_path)
    assert (
        "| dpo, x, float32 | 0.667 (1) | 1.33 (1) | 2 (1) | 3.0× (1.0×) | 1.5× | 0.00 GiB | 25% | 0.50 |"
        in page
    )
    assert "25% are padding, 10% prompts once more" in page
    assert "old" not in page
    assert page.startswith("before")
    assert page.endswith("after\n")


def test_the_summary_has_a_row_a_method_with_ratios_to_trl_s_default_and_best() -> None:
    lines = tables.summary(
        report(comparison(), comparison("kto"), comparison("kto", "bfloat16"))
    ).splitlines()
    cells = "2 pairs/s | 3.0× | 1.5× | 25%"
    assert lines[-2] == f"| dpo, x | {cells} | – | – | – | – |"
    assert lines[-1] == f"| kto, x | {cells} | {cells} |"


def test_results_keep_what_was_measured_under_the_same_conditions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    Results(path, ["first"], "42M").add(comparison())
    Results(path, ["second"], "42M").add(comparison("kto"))
    again = Results(path, ["third"], "42M")
    again.add(comparison("kto") | {"data": "x", "matrix_rate": 2e9})
    key = {"data": "x", "precision": "float32", "batch_size": 2}
    assert again.has(method="dpo", **key)
    assert not again.has(method="orpo", **key)
    held = json.loads(path.read_text())["comparisons"]
    assert [(each["method"], each["command"]) for each in held] == [("dpo", "first"), ("kto", "third")]

    monkeypatch.setattr(results, "report", lambda *a, **held: report() | {"machine": "another"} | held)
    elsewhere = Results(path, ["fourth"], "42M")
    assert not elsewhere.has(method="dpo", **key)
    elsewhere.add(comparison("orpo"))
    assert [each["method"] for each in json.loads(path.read_text())["comparisons"]] == ["orpo"]
    aside = json.loads((tmp_path / "results.elsewhere.json").read_text())
    assert aside["comparisons"] == held, "measured elsewhere, and not lost"


WARM = {
    **{
        "pairs": 60_000,
        "tokens_a_pair": 180.4,
        "files": 300,
        "cache_bytes": 44_000_000,
        "model_bytes": 10**8,
    },
    "few_pairs": {"pairs": 64, "peak_bytes": 6 * 10**8},
    "starts": {
        "tokens kept": {
            **{"seconds": 12.34, "seconds_of_imports": 4.0, "processor_seconds": 11.0},
            "peak_bytes": 9 * 10**8,
        }
    },
}


def test_the_cache_s_table_says_seconds_memory_and_the_share_of_an_epoch() -> None:
    cold = [{"data": "hh", "precision": "float32", "share_of_an_epoch": 0.334}]
    lines = tables.tables(report() | {"warm": WARM, "cold": cold}).splitlines()
    assert "| tokens kept | 12.3 | 4.0 | 11.0 | 0.80 GB | 0.30 GB |" in lines
    assert "above a run of 64 pairs" in lines[4]
    assert lines[-1] == "Cold scoring as a share of one training epoch: 0.33 on *hh* (float32)."


@pytest.mark.slow
def test_a_warm_start_finds_every_record_that_was_written_for_it(tmp_path: Path) -> None:
    options = cache._options(["--quick", "--pairs", "1"])
    settings = cache._run(tmp_path, options)
    facts = cache._fill(settings, options.files)
    assert (facts["pairs"], facts["files"]) == (500, 5)
    told = Console(record=True, width=300, force_terminal=False)
    train(settings, console=told)
    assert (
        "Reference on training data: known from an earlier run; 8 records scored again" in told.export_text()
    )


def test_every_method_is_measured_on_data_it_can_read() -> None:
    for name, method in METHODS.items():
        assert method.keys["rl"] == name
        assert set(method.data) <= set(DATA)
