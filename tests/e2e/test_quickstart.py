"""`make quickstart`, as the Makefile runs it: what is made, what is learned, and what is left behind."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from quickstart_commands import MADE, ROOT, made_by_quickstart, recipe, run

PROGRAM = runpy.run_path(str(ROOT / "examples" / "quickstart" / "make.py"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the target was run, and what it printed from training on."""
    made, folder = made_by_quickstart(tmp_path_factory), tmp_path_factory.mktemp("clone")
    shutil.copytree(made, folder, symlinks=True, dirs_exist_ok=True)
    printed = "".join(run(command, folder) for command in recipe()[1:])
    return folder / MADE, printed


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_it_learns_from_half_to_above_ninety_percent(quickstart: tuple[Path, str]) -> None:
    held_out = [record for record in logged(quickstart[0]) if "eval_rewards/accuracies" in record]

    first, last = held_out[0], held_out[-1]
    assert first["step"] == 0
    assert first["eval_rewards/accuracies"] == 0.5
    assert first["eval_rewards/margins"] == 0.0
    assert last["eval_rewards/accuracies"] > 0.9
    assert last["eval_rewards/margins"] > 0.5
    # Better not because everything became unlikely: the chosen completions did not lose.
    assert last["eval_logps/chosen"] > first["eval_logps/chosen"] - 0.5


@pytest.mark.slow
def test_it_shows_the_plan_the_proof_and_the_change(quickstart: tuple[Path, str]) -> None:
    printed = quickstart[1]

    assert "Reference: initial_policy, precomputed" in printed
    assert "Before step 1 policy and reference differed by at most 0 nats" in printed
    assert "reward accuracy" in printed
    assert printed.count("  base     ") == printed.count("  aligned  ") >= 3


@pytest.mark.slow
def test_the_base_had_no_manners_and_the_aligned_model_has(quickstart: tuple[Path, str]) -> None:
    output, _ = quickstart
    rows = [json.loads(row) for row in (output / "pairs" / "held-out.jsonl").read_text().splitlines()]
    questions = sorted({row["prompt"][0]["content"] for row in rows})[::3]

    base = [answer(output / "base", question) for question in questions]
    aligned = [answer(output, question) for question in questions]

    openings = tuple(style.split("{")[0].strip() for style in PROGRAM["COURTEOUS"])
    places = [next(place for thing, place in PROGRAM["PLACE"].items() if thing in q) for q in questions]
    assert any(not text.startswith(openings) for text in base)
    assert all(text.startswith(openings) for text in aligned)
    right = sum(place in text for place, text in zip(places, aligned, strict=True))
    assert right >= 0.8 * len(questions)


def answer(folder: Path, question: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_it_leaves_an_ordinary_checkpoint_with_its_papers(quickstart: tuple[Path, str]) -> None:
    output, _ = quickstart

    plan = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    card = (output / "README.md").read_text(encoding="utf-8")

    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in output.iterdir()}
    assert not list(output.rglob("*.bin"))
    assert plan["reference"]["source"] == "initial_policy"
    assert plan["proof"]["max_difference"] <= plan["proof"]["tolerance"]
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "outputs/quickstart/base"
    assert "| reward accuracy |" in card


@pytest.mark.slow
def test_what_was_made_is_kept(quickstart: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    output, _ = quickstart
    before = (output / "base" / "model.safetensors").stat().st_mtime_ns

    PROGRAM["main"](output)

    assert (output / "base" / "model.safetensors").stat().st_mtime_ns == before
    assert "Keeping" in capsys.readouterr().out


def test_making_it_twice_makes_the_same(tmp_path: Path) -> None:
    for name in ("first", "second"):
        PROGRAM["main"](tmp_path / name, steps=2)

    for file in (
        "base/model.safetensors",
        "base/tokenizer.json",
        "pairs/train.jsonl",
        "pairs/held-out.jsonl",
    ):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_held_out_things_never_appear_in_training_pairs(tmp_path: Path) -> None:
    PROGRAM["main"](tmp_path, steps=1)

    train, held_out = ((tmp_path / "pairs" / name).read_text() for name in ("train.jsonl", "held-out.jsonl"))

    things = {thing for thing in PROGRAM["PLACE"] if f" {thing}" in held_out}
    assert things
    assert not any(
        f" {thing} " in train or f" {thing}?" in train or f" {thing}." in train for thing in things
    )


def test_half_made_is_made_again(tmp_path: Path) -> None:
    PROGRAM["main"](tmp_path, steps=1)
    (tmp_path / "made-by.txt").write_text("another version of the program\n", encoding="utf-8")
    (tmp_path / "pairs" / "train.jsonl").write_text("", encoding="utf-8")

    PROGRAM["main"](tmp_path, steps=1)

    assert (tmp_path / "pairs" / "train.jsonl").stat().st_size > 0
