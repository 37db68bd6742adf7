"""Reading a YAML: every mistake at once, each with its place and its remedy."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fiducial.config.load import DictDefault, load_config, load_run, validate_config
from fiducial.errors import ConfigError


def run_file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_run(run_file(folder, text), overrides)
    return str(error.value).splitlines()


def test_every_mistake_is_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = refusal(
        tmp_path,
        "base_model: some/model\n"
        "rl: dpo\n"
        "rl_beat: 0.2\n"
        "adapter: lora\n"
        "lora_r: many\n"
        "simpo_gamma: 0.5\n"
        "datasets:\n"
        "  - path: rows.jsonl\n"
        "    splt: train\n"
        "neftune_noise_alpha: 5\n",
        "seed=abc",
    )
    path = tmp_path / "run.yaml"
    assert lines == [
        f"{path}:3  rl_beat: 0.2 — unknown key; did you mean rl_beta?",
        f"{path}:5  lora_r: many — must be a whole number > 0",
        f"{path}:6  simpo_gamma: 0.5 — has no effect with dpo; it belongs to rl: simpo or "
        "cpo_loss_type: alphapo; remove it",
        f"{path}:9  datasets.0.splt: train — unknown key; did you mean split?",
        f"{path}:10  neftune_noise_alpha: 5 — noise on the policy alone would move it away from the"
        " reference; remove it",
        "override 'seed=abc'  seed: abc — must be a whole number ≥ 0 and < 4294967296",
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("learning_rate: abc", "must be a number > 0"),
        ("learning_rate: .inf", "must be a number > 0"),
        ("learning_rate: true", "must be a number > 0"),
        ("learning_rate: -1", "must be a number > 0"),
        ("micro_batch_size: 1.5", "must be a whole number > 0"),
        ("adam_beta1: 1", "must be a number ≥ 0 and < 1"),
        ("adam_beta2: 1", "must be a number ≥ 0 and < 1"),
        ("trust_remote_code: perhaps", "must be true or false"),
        ("model_revision: 12", "must be text; put it in quotes"),
        ("excess_length_strategy: cut", "must be one of drop, truncate or raise"),
        ("micro_batch_tokens: many", "must be a whole number > 0 or auto"),
        ("tokens: word", "must be a list, each item text"),
        ("special_tokens: [a]", "must be a mapping, each value text"),
        ("optim_args: 3", "must be text or a mapping, each value any value"),
        ("fsdp_version: 1", "must be 2"),
        ("datasets: rows.jsonl", "must be a list of mappings; write datasets: [{path: rows.jsonl}]"),
        ("base_model:", "is required: write base_model: a local folder or a hub name"),
        ("output_dir: [a]", "must be text"),
        ("seed: -1", "must be a whole number ≥ 0 and < 4294967296"),
        ("resume_from_checkpoint: true", "must be a checkpoint's folder; auto_resume_from_checkpoints: true"),
        ("bfloat16: auto", "must be true or false; write bf16: auto"),
        ("max_samples: 3", "unknown key; write datasets: [{path: ..., split: 'train[:1000]'}]"),
        ("do_train: true", "unknown key; the command says what is done; remove it"),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_what_it_must_be(
    tmp_path: Path, line: str, why: str
) -> None:
    lines = refusal(tmp_path, f"rl: dpo\n{'' if line.startswith('base') else 'base_model: m'}\n{line}\n")
    assert len(lines) == 1
    key, _, value = line.partition(":")
    place = f"{tmp_path / 'run.yaml'}:3  {key}"
    shown = {"datasets": ": rows.jsonl", "tokens": ": word"}.get(key, f":{value}" if value else "")
    assert lines[0].startswith(place + (shown if "[" not in value else ": ['a']"))
    assert f" — {why}" in lines[0]


def test_a_missing_path_of_a_dataset_is_placed_at_the_dataset(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "base_model: m\ndatasets:\n  - path: a\n  - split: train\n")
    (line,) = lines
    assert line.startswith(f"{tmp_path / 'run.yaml'}:4  datasets.1.path — is required: a file, a folder or a")


@pytest.mark.parametrize("number", ["1e-6", "1E-6", "1.0e-6", "0.000001", "'1e-6'", "1_0e-7"])
def test_every_way_to_write_a_number_is_a_number(tmp_path: Path, number: str) -> None:
    config = load_config(run_file(tmp_path, f"base_model: m\nlearning_rate: {number}\n"))
    assert config.optimization.learning_rate == pytest.approx(1e-6)


def test_a_hash_that_looks_like_a_number_is_shown_as_written(tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, "base_model: m\nmodel_revision: 12e45\n")
    assert "model_revision: 12e45 — must be text; put it in quotes" in line
    assert (
        load_config(run_file(tmp_path, "base_model: m\nmodel_revision: '12e45'\n")).model.revision == "12e45"
    )


def test_null_means_absent_everywhere(tmp_path: Path) -> None:
    absent = load_config(run_file(tmp_path, "base_model: m\nrl: kto\ndatasets: [{path: a}]\n"))
    null = "\n".join(
        f"{key}:" for key in ("rl_beta", "adapter", "bf16", "val_set_size", "lora_model_dir", "vllm")
    )
    text = (
        "base_model: m\nrl: kto\ndatasets: [{path: a, split: null, type:}]\nspecial_tokens: {pad_token:}\n"
        + null
    )
    assert load_config(run_file(tmp_path, text)) == absent


def test_a_key_written_twice_is_reported_with_everything_else(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "base_model: m\nrl: dpo\nseed: x\nrl: kto\ndatasets: [{path: a, path: b}]\n")
    path = tmp_path / "run.yaml"
    assert lines == [
        f"{path}:3  seed: x — must be a whole number ≥ 0 and < 4294967296",
        f"{path}:4  rl — written twice, first in line 2; keep one",
        f"{path}:5  datasets.0.path — written twice, first in line 5; keep one",
    ]


def test_anchors_aliases_and_merge_keys_work(tmp_path: Path) -> None:
    text = (
        "base_model: m\n"
        "datasets:\n"
        "  - &first {path: a, split: train}\n"
        "  - &second\n"
        "    <<: *first\n"
        "    path: b\n"
        "test_datasets: [*second]\n"
    )
    config = load_config(run_file(tmp_path, text))
    assert config.data is not None
    assert [(item.path, item.split) for item in config.data.datasets] == [("a", "train"), ("b", "train")]
    assert config.data.test_datasets == config.data.datasets[1:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; a run needs at least base_model"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "holds a list, not `key: value` lines"),
        ("word\n", "holds the single value 'word'"),
        ("a: [1\n", "run.yaml:2  not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: !!python/object:os.system {}\n", "run.yaml:1  not valid YAML"),
        ("a: &a [*a]\n", "the alias repeats itself without end"),
        ("? [1, 2]\n: 3\n", "run.yaml:1"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (line,) = refusal(tmp_path, text)
    assert message in line


def test_aliases_of_aliases_are_stopped_before_they_fill_the_memory(tmp_path: Path) -> None:
    layers = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 9))
    (line,) = refusal(tmp_path, f"l0: &l0 [a]\n{layers}")
    assert "repeats itself" in line


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="the run's YAML file first, and settings after it"):
        load_config("rl_beta=0.2")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_notes_name_what_was_left_out(tmp_path: Path) -> None:
    run = load_run(
        run_file(tmp_path, "base_model: m\nrl: dpo\nsample_packing: false\nneftune_noise_alpha: 0\n")
    )
    path = tmp_path / "run.yaml"
    assert [note.split(" — ")[0] for note in run.notes] == [
        f"{path}:4  neftune_noise_alpha: 0",
        f"{path}:3  sample_packing: false",
    ]
    assert all("left out" in note for note in run.notes)
    assert run.source_text.startswith("base_model: m")


def test_a_learning_rate_that_is_assumed_is_said(tmp_path: Path) -> None:
    run = load_run(run_file(tmp_path, "base_model: m\nrl: dpo\ndatasets: [{path: a}]\n"))
    assert [note for note in run.notes if "learning_rate" in note and "1e-06" in note]
    assert run.config.optimization.learning_rate == 1e-6


def test_settings_from_python_are_checked_the_same_way() -> None:
    minimal = validate_config({"base_model": "x", "rl": "dpo"})
    assert minimal.data is None
    assert minimal.method is not None
    assert validate_config(DictDefault(base_model="x", rl="dpo")) == minimal
    assert validate_config(minimal) is minimal
    with pytest.raises(ConfigError, match=r"^rl_beat: 0.2 — unknown key; did you mean rl_beta\?$"):
        validate_config({"base_model": "x", "rl": "dpo", "rl_beat": 0.2})


@pytest.mark.parametrize("given", ["run.yaml", Path("run.yaml"), None])
def test_what_is_no_run_is_refused_with_the_way_to_read_a_file(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"no run: .* load_config\(path\)"):
        validate_config(given)


def test_a_path_from_python_is_the_text_it_stands_for() -> None:
    given = {
        "base_model": Path("model"),
        "datasets": [{"path": Path("rows.jsonl")}],
        "output_dir": Path("out"),
    }
    assert validate_config(given) == validate_config(
        {"base_model": "model", "datasets": [{"path": "rows.jsonl"}], "output_dir": "out"}
    )


def test_rows_in_memory_are_to_be_saved_first() -> None:
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for given, place in ((rows, "datasets"), ([rows], "datasets.0")):
        with pytest.raises(
            ConfigError, match=rf"^{place}: Dataset\(\{{ features: .* — must be .*save_to_disk"
        ):
            validate_config({"base_model": "model", "datasets": given})


def test_lengths_without_datasets_are_checked_and_need_none() -> None:
    assert validate_config({"base_model": "x", "rl": "dpo", "sequence_len": 512}).data is None
    with pytest.raises(ConfigError, match="sequence_len: 0 — must be a whole number > 0"):
        validate_config({"base_model": "x", "rl": "dpo", "sequence_len": 0})


def test_paths_stay_as_the_user_wrote_them(tmp_path: Path) -> None:
    config = load_config(run_file(tmp_path, "base_model: ./model\ndatasets: [{path: rows.jsonl}]\n"))
    assert config.model.base_model == "./model"
    assert config.data is not None
    assert config.data.datasets[0].path == "rows.jsonl"


def test_reading_a_run_imports_no_torch(tmp_path: Path) -> None:
    path = run_file(tmp_path, "base_model: m\nrl: dpo\n")
    code = (
        f"import sys; from fiducial.config.load import load_config; load_config({str(path)!r});"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_tilde_is_the_users_home_wherever_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {
        "base_model": "~/base",
        "tokenizer_config": "~/tokenizer",
        "adapter": "lora",
        "lora_model_dir": "~/adapter",
        "rl": "dpo",
        "reference": {"model": "~/reference", "adapter": "~/its-adapter"},
        "output_dir": "~/out",
        "resume_from_checkpoint": "~/out/checkpoint-1",
    }
    run = validate_config(settings)
    assert run.adapter is not None
    found = {
        *(run.model.base_model, run.tokenizer.path, run.adapter.path),
        *(run.reference.model, run.reference.adapter),
        *(run.output.output_dir, run.output.resume_from_checkpoint),
    }
    names = "base tokenizer adapter reference its-adapter out out/checkpoint-1"
    assert found == {str(tmp_path / name) for name in names.split()}
    assert validate_config({"base_model": "some/model"}).output.output_dir == "./model-out"
