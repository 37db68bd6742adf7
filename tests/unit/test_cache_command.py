"""`fiducial cache`: what it tells of a cache, what it removes, and how it explains a miss."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from fiducial import cli
from fiducial.cache_command import duration, size
from fiducial.errors import ConfigError
from fiducial.train import preprocess
from run_configs import run_config, write_pairs
from tiny import save_adapter, save_checkpoint

Cache = Callable[..., Result]


@pytest.fixture
def cache() -> Cache:
    """Runs `fiducial cache` in this process, on a wide terminal."""

    def run(*arguments: str) -> Result:
        command = ["cache", *arguments]
        return CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, command, catch_exceptions=False)

    return run


def words(result: Result) -> str:
    return " ".join(result.output.split())


def filled(folder: Path, **settings: Any) -> dict[str, Any]:
    """A run whose reference was scored into the test's default cache."""
    settings = run_config(folder, **settings)
    preprocess(settings, console=Console(quiet=True))
    return settings


def explained(cache: Cache, folder: Path, settings: dict[str, Any], *overrides: str) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    result = cache("explain", str(path), *overrides)
    assert result.exit_code == 0, result.output
    return words(result)


def test_an_empty_cache_is_told(cache: Cache, reference_cache: Path) -> None:
    assert cache("prune").exit_code == 0
    for command in ("list", "verify"):
        result = cache(command)
        assert result.exit_code == 0
        assert f"No reference log-probs in {reference_cache}" in words(result)


def test_it_lists_and_verifies_what_runs_have_scored(
    cache: Cache, tmp_path: Path, reference_cache: Path
) -> None:
    filled(tmp_path)
    listed = words(cache("list"))
    assert "base-llama" in listed
    assert "float32" in listed
    assert " 24 " in listed
    verified = cache("verify")
    assert verified.exit_code == 0
    assert "24 records of 1 references" in words(verified)


def test_a_narrow_terminal_loses_nothing(cache: Cache, tmp_path: Path, reference_cache: Path) -> None:
    narrow = CliRunner(env={"COLUMNS": "50"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(filled(tmp_path)))
    listed = narrow.invoke(cli.app, ["cache", "list"]).output
    assert "base-llama" in "".join(line[2:7] for line in listed.splitlines())
    assert "…" not in listed
    [manifest] = reference_cache.glob("*/identity.json")
    manifest.write_text("{")
    explained = narrow.invoke(cli.app, ["cache", "explain", str(tmp_path / "run.yaml")]).output
    assert f"{manifest} is damaged" in explained, "a path is in one piece"


def test_a_server_s_precision_is_its_own(cache: Cache, tmp_path: Path, reference_cache: Path) -> None:
    filled(tmp_path)
    [manifest] = reference_cache.glob("*/identity.json")
    manifest.write_text(json.dumps({"checkpoint": "tiny", "dtype": "served", "autocast": "served"}))
    assert "tiny the server's" in words(cache("list"))


def test_verify_names_what_is_damaged(cache: Cache, tmp_path: Path, reference_cache: Path) -> None:
    filled(tmp_path)
    [file] = reference_cache.glob("*/*.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = cache("verify")
    assert result.exit_code == 2
    assert file.name in result.output
    assert "never used" in result.output
    (file.parent / "identity.json").write_text("{")
    assert "identity.json" in cache("verify").output


def test_verify_names_what_is_another_reference_s(
    cache: Cache, tmp_path: Path, reference_cache: Path
) -> None:
    filled(tmp_path)
    filled(tmp_path, family="qwen2")
    one, other = (path.parent for path in reference_cache.glob("*/identity.json"))
    [file] = other.glob("*.arrow")
    shutil.copy(file, one)
    result = cache("verify")
    assert result.exit_code == 2
    assert f"{one / file.name}: its records are of another reference, {other.name}" in words(result)
    (one / file.name).unlink()
    shutil.copy(other / "identity.json", one)
    result = cache("verify")
    assert result.exit_code == 2
    assert f"{one}/identity.json: it is of another reference (0 records)" in words(result)


def test_prune_removes_the_oldest_and_what_was_left_over(
    cache: Cache, tmp_path: Path, reference_cache: Path
) -> None:
    filled(tmp_path)
    filled(tmp_path, family="qwen2")
    folders = {
        json.loads(path.read_text())["checkpoint"]: path.parent
        for path in reference_cache.glob("*/identity.json")
    }
    old, new = folders[str(tmp_path / "base-llama")], folders[str(tmp_path / "base-qwen2")]
    for path in old.iterdir():
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    (new / "x.arrow.damaged").write_text("")
    (new / ".x.arrow.0.part").write_text("")

    assert "Would remove 1 references" in words(cache("prune", "--older-than", "30d", "--dry-run"))
    assert old.exists()
    said = words(cache("prune", "--older-than", "30d"))
    assert "Removed 1 references" in said
    assert "1 leftover" in said, "a file that may still be written stays"
    assert not old.exists()
    assert len(list(new.glob("*.arrow"))) == 1

    assert "Removed 0 references" in words(cache("prune", "--max-size", "1GB"))
    assert "Removed 1 references" in words(cache("prune", "--max-size", "1KB"))
    assert not new.exists()


def test_what_a_link_leads_to_is_listed_and_removed(
    cache: Cache, tmp_path: Path, reference_cache: Path
) -> None:
    filled(tmp_path)
    [folder] = [path.parent for path in reference_cache.glob("*/identity.json")]
    folder.rename(tmp_path / "larger-disk")
    folder.symlink_to(tmp_path / "larger-disk")
    assert folder.name[:12] in words(cache("list"))
    assert "24 records of 1 references" in words(cache("verify"))
    assert "24 records" in words(cache("prune", "--max-size", "0"))
    assert not (tmp_path / "larger-disk").exists()
    assert not folder.is_symlink()
    assert "24 completions" in explained(cache, tmp_path, filled(tmp_path)), "a run makes it anew"


def test_prune_ends_what_a_killed_one_had_begun(cache: Cache, tmp_path: Path, reference_cache: Path) -> None:
    filled(tmp_path)
    [folder] = [path.parent for path in reference_cache.glob("*/identity.json")]
    folder.rename(left := folder.with_name(f"{folder.name}.removed"))
    assert "1 leftover" in words(cache("prune"))
    assert not left.exists()


def test_mirrors_of_caches_at_urls_are_listed_verified_and_pruned(
    cache: Cache, tmp_path: Path, reference_cache: Path
) -> None:
    filled(tmp_path, reference={"cache": "memory://pruned"})
    [mirror] = reference_cache.glob("mirrors/*/*/identity.json")
    assert "base-llama (mirror of a URL's)" in words(cache("list"))
    assert "24 records of 1 references" in words(cache("verify"))
    assert "Nothing to merge" in words(cache("merge"))
    said = explained(cache, tmp_path, run_config(tmp_path))
    assert "The cache is empty" in said, "it serves runs that name the URL alone"
    assert "(mirror of a URL's)" in words(cache("prune", "--older-than", "0s"))
    assert not mirror.exists()
    fetched = run_config(tmp_path, reference={"cache": "memory://pruned"})
    assert "all 24 completions have records" in explained(cache, tmp_path, fetched)


def test_merge_makes_few_files_of_many(cache: Cache, tmp_path: Path, reference_cache: Path) -> None:
    assert "Nothing to merge" in words(cache("merge"))
    filled(tmp_path, micro_batch_tokens=64, reference={"flush_seconds": 1e-6})
    files = len(list(reference_cache.glob("*/*.arrow")))
    assert files > 5
    assert f"{files} small files were made into 1" in words(cache("merge"))
    assert "24 records of 1 references" in words(cache("verify"))
    assert "all 24 completions have records" in explained(cache, tmp_path, run_config(tmp_path))


@pytest.mark.parametrize(("text", "seconds"), [("30d", 2592000), ("1.5h", 5400), ("10 s", 10)])
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize(("text", "number"), [("20GB", 2 * 10**10), ("1.5 mb", 1500000), ("7", 7)])
def test_sizes(text: str, number: int) -> None:
    assert size(text) == number


@pytest.mark.parametrize("wrong", ["", "30", "d", "-1d"])
def test_a_length_of_time_that_is_none_is_refused(cache: Cache, wrong: str) -> None:
    with pytest.raises(ConfigError, match="30d"):
        duration(wrong)
    assert cache("prune", "--older-than", wrong or "x").exit_code == 2


def test_what_changes_nothing_about_the_reference_is_a_hit(
    cache: Cache, tmp_path: Path, reference_cache: Path
) -> None:
    settings = filled(tmp_path)
    lora = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True}
    [identity] = [path.parent.name for path in reference_cache.glob("*/identity.json")]
    assert f"base-llama [{identity[:12]}], weights in" in explained(cache, tmp_path, settings)
    for change in ({}, {"learning_rate": 1e-4}, {"seed": 7}, {"rl": "ipo"}, {"num_epochs": 3}, lora):
        assert "all 24 completions have records" in explained(cache, tmp_path, settings | change), change


def test_new_rows_are_counted_by_what_is_new(cache: Cache, tmp_path: Path) -> None:
    settings = filled(tmp_path)
    longer = write_pairs(tmp_path / "longer.jsonl", 14)
    rows = longer.read_text().splitlines()
    rows[0] = json.dumps(json.loads(rows[0]) | {"rejected": " something else"})
    longer.write_text("\n".join(rows))
    said = explained(cache, tmp_path, settings | {"datasets": [{"path": str(longer)}]})
    assert "23 of 28 completions have records" in said
    assert "4 follow a prompt without any record" in said
    assert "1 are new after a prompt that has records" in said


def test_a_miss_is_explained_by_what_differs(cache: Cache, tmp_path: Path) -> None:
    settings = filled(tmp_path)
    assert "the weights' precision: float32 there, bfloat16 here" in explained(
        cache, tmp_path, settings | {"bf16": "full"}
    )
    said = explained(cache, tmp_path, settings, "overrides_of_model_config={rms_norm_eps: 0.1}")
    assert "rms_norm_eps of the config: 1e-06 there, 0.1 here" in said
    other = AutoModelForCausalLM.from_pretrained(settings["base_model"])
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(settings["base_model"])
    said = explained(cache, tmp_path, settings)
    assert "weights differ (model.norm.weight)" in said
    assert "records): 1 of" in said
    save_checkpoint(tmp_path / "second", seed=3)
    assert "(24 records): 21 of 21 weights differ" in explained(
        cache, tmp_path, settings | {"base_model": str(tmp_path / "second")}
    )


def test_where_files_do_not_tell_the_model_is_loaded(cache: Cache, tmp_path: Path) -> None:
    adapter = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True, "peft_init_lora_weights": False}
    settings = filled(tmp_path, **adapter)
    assert "all 24 completions" in explained(cache, tmp_path, settings)
    assert "weights differ" in explained(cache, tmp_path, settings | {"seed": 9})
    assert "are only there" in explained(
        cache, tmp_path, {key: value for key, value in settings.items() if key not in adapter}
    )


def test_a_named_adapter_is_explained_in_a_run_that_evaluates(cache: Cache, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base-llama")
    named = {"adapter": str(save_adapter(tmp_path / "sft", base))}
    adapter = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True, "reference": named}
    settings = filled(tmp_path, **adapter, val_set_size=2, eval_steps=1)
    said = explained(cache, tmp_path, settings)
    assert "all 20 completions" in said
    assert "all 4 completions" in said


def test_a_run_that_reads_no_cache_is_told(cache: Cache, tmp_path: Path) -> None:
    live = run_config(tmp_path, reference={"schedule": "live"})
    assert "the reference is live" in explained(cache, tmp_path, live)
    assert "the reference is none" in explained(cache, tmp_path, run_config(tmp_path, rl="orpo"))
    assert "The cache is empty" in explained(cache, tmp_path, run_config(tmp_path))
