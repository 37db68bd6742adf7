"""`key=value` on the command line."""

from pathlib import Path

import pytest

from fiducial.config.load import load_config
from fiducial.config.schema import RunConfig
from fiducial.errors import ConfigError

TEXT = """\
base_model: m
rl: dpo
adapter: lora
lora_target_modules: [q_proj, v_proj]
datasets:
  - path: a.jsonl
    split: train
rl_beta: wrong
"""


def load(folder: Path, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(TEXT)
    return load_config(path, ["rl_beta=0.3", *overrides])


def test_an_override_replaces_the_value_in_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path, "datasets.0.split=train[:100]", "lora_target_modules.0=k_proj", "learning_rate=2e-5"
    )
    assert config.method is not None
    assert config.method.model_dump()["beta"] == 0.3
    assert config.data is not None
    assert config.data.datasets[0].split == "train[:100]"
    assert config.adapter is not None
    assert config.adapter.target_modules == ("k_proj", "v_proj")
    assert config.optimization.learning_rate == 2e-5


def test_values_are_read_as_yaml(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "lora_target_modules=[o_proj]",
        "reference={source: separate_model}",
        "gradient_checkpointing=true",
        "optim_args=betas=0.9",
    )
    assert config.optimization.optim_args == "betas=0.9", "the first sign divides"
    assert config.adapter is not None
    assert config.adapter.target_modules == ("o_proj",)
    assert config.reference.source == "separate_model"
    assert config.model.gradient_checkpointing


def test_an_override_makes_the_mappings_and_the_items_it_needs(tmp_path: Path) -> None:
    config = load(tmp_path, "reference.schedule=live", "datasets.1.path=b.jsonl", "datasets.1.split=x")
    assert config.reference.schedule == "live"
    assert config.data is not None
    assert [item.path for item in config.data.datasets] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("override", ["adapter=", "adapter=null"])
def test_an_empty_override_takes_a_value_away(tmp_path: Path, override: str) -> None:
    config = load(tmp_path, override, "lora_target_modules=null")
    assert config.adapter is None


def test_the_later_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "seed=1", "seed=2").optimization.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed'  not of the form key=value; write for example rl_beta=0.2"),
        ("=3", "override '=3'  not of the form key=value"),
        ("--seed=3", "override '--seed=3'  overrides have no dashes; write seed=3"),
        ("sede=3", "override 'sede=3'  sede: 3 — unknown key; did you mean seed?"),
        ("seed=x", "override 'seed=x'  seed: x — must be a whole number"),
        (
            "datasets.0.splt=x",
            "override 'datasets.0.splt=x'  datasets.0.splt: x — unknown key; did you mean split?",
        ),
        ("datasets.2.path=x", "override 'datasets.2.path=x'  datasets has 1 item; positions count from 0"),
        (
            "lora_target_modules.3=x",
            "lora_target_modules has 2 items; write lora_target_modules.2 to add one more",
        ),
        ("datasets.split=x", "datasets is a list; name the item, for example datasets.0.split"),
        ("rl.0=x", "rl is 'dpo'; it has no part 0"),
        ("tokens.0=x", "tokens is no list yet; write tokens='[...]'"),
        ("seed=[1", "override 'seed=[1'  not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "reference={model:x}",
            "reference.model:x — unknown key; a colon is followed by a space; write model: x",
        ),
        ("datasets[0].path=x", "positions follow a dot; write datasets.0.path=..."),
        ("refrence.model=x", "override 'refrence.model=x'  refrence: {'model': 'x'} — unknown key; did you"),
        ("reference={source: auto, source: none}", "reference.source — written twice"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, override)
    assert message in str(error.value)


def test_all_wrong_overrides_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "sede=3", "seed=x", "datasets.4=1")
    assert len(str(error.value).splitlines()) == 3
