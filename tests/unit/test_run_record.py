"""The record a run leaves: what comes back from it, and what is said of one that is not whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from fiducial.config.load import load_run, validate_config
from fiducial.errors import ConfigError, ModelError
from fiducial.finished import from_config, from_folder
from fiducial.reference.differences import changes
from fiducial.run_record import (
    RECORD_FILE,
    Answers,
    RunRecord,
    changed_settings,
    find_record,
    read_record,
    require_resumable,
    require_same_reference,
    run_id,
    trained_by,
)

SETTINGS: dict[str, Any] = {
    "base_model": "base",
    "rl": "kto",
    "datasets": [{"path": "pairs.jsonl", "type": "chatml.intel"}],
    "adapter": "lora",
    "lora_target_modules": ["q_proj", "v_proj"],
    "learning_rate": 1e-5,
}
IDENTITY: dict[str, Any] = {
    "checkpoint": "base",
    "weights": "1",
    "dtype": "float32",
    "autocast": "None",
    "matmul": "ieee",
    "scoring": 1,
    "format": 2,
    "fingerprint": {"tensors": {"a.weight": "x", "b.weight": "y"}, "settings": {"eps": 1.0, "theta": 2}},
}
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml"))


def record(**fields: Any) -> RunRecord:
    start = Answers(("k1", "k2"), ((-0.1, -0.25), (-1.5,)), 1e-5)
    given = {"run": validate_config(SETTINGS), "settings": SETTINGS, "reference": IDENTITY, "start": start}
    return RunRecord(**(given | fields))


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    for written in (
        record(),
        record(settings=None, reference=None, start=None),
        record(base=IDENTITY, moved=record().start, moved_weights="ab", running={"delta": 0.25}),
    ):
        written.write(tmp_path)
        assert read_record(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_FILE]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_survives_the_record(example: Path, tmp_path: Path) -> None:
    loaded = load_run(example)
    RunRecord(loaded.config, loaded.settings, None, None).write(tmp_path)
    found = read_record(tmp_path)
    assert found.run == loaded.config
    assert found.settings is not None
    assert validate_config(found.settings) == loaded.config


def test_a_checkpoint_has_its_own_record_or_its_runs(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    assert find_record(checkpoint) is None
    record(settings=None).write(tmp_path)
    assert read_record(checkpoint).settings is None
    record().write(checkpoint)
    assert read_record(checkpoint).settings == SETTINGS
    other = tmp_path / "other"
    other.mkdir()
    assert find_record(other) is None  # a folder beside it is no part of the run


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "run": {"model": {}}, "settings": null}']
)
def test_a_damaged_record_is_no_record(content: str, tmp_path: Path) -> None:
    (tmp_path / RECORD_FILE).write_text(content)
    with pytest.raises(ConfigError, match="is damaged or was not written by Fiducial"):
        read_record(tmp_path)


def test_a_record_knows_whose_weights_lie_beside_it(tmp_path: Path) -> None:
    assert (run_id(tmp_path), trained_by(tmp_path)) == ("", None)
    ended = record(id="first", trained_by="first")
    ended.write(tmp_path)
    assert (run_id(tmp_path), trained_by(tmp_path)) == ("first", "first")
    record(id="second").beside_weights_of(trained_by(tmp_path)).write(tmp_path)
    assert not read_record(tmp_path).has_ended
    (tmp_path / "model.safetensors").touch()
    for find in (lambda: from_folder(tmp_path), lambda: from_config(validate_config(SETTINGS), tmp_path)):
        with pytest.raises(ModelError, match="has not ended, and the weights there are an earlier run's"):
            find()
    path = tmp_path / RECORD_FILE
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if "id" not in k}))
    path.write_text(path.read_text().replace('"trained_by"', '"unknown"'))
    assert read_record(tmp_path).has_ended, "a record of a version without ids"


def test_settings_that_changed_since_are_named_by_their_keys() -> None:
    then = validate_config(SETTINGS)
    elsewhere = SETTINGS | {"output_dir": "other", "logging_steps": 3, "bf16": "auto"}
    assert changed_settings(then, validate_config(elsewhere)) == []
    decided = then.model_copy(update={"model": then.model.model_copy(update={"autocast": None})})
    assert changed_settings(decided, validate_config(SETTINGS)) == []
    now = validate_config(SETTINGS | {"learning_rate": 0.1, "rl_beta": 0.5, "lora_r": 4})
    assert changed_settings(then, now) == [
        "lora_r: 8 then, 4 now",
        "method.beta: 0.1 then, 0.5 now",
        "learning_rate: 1e-05 then, 0.1 now",
    ]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"optimizer": "sgd"}, "optimizer: adamw_torch_fused then, sgd now"),
        ({"lora_r": 16}, "lora_r: 8 then, 16 now"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules: "),
        ({"lora_alpha": 32, "peft_use_rslora": True}, "lora_alpha: 16 then, 32 now; peft_use_rslora"),
        ({"peft_init_lora_weights": "pissa"}, "peft_init_lora_weights: True then, pissa now"),
        (
            {"lora_modules_to_save": ["lm_head"], "peft_use_dora": True},
            "lora_modules_to_save: .*; peft_use_dora",
        ),
        (
            {"reference": {"schedule": "synced", "mixup_alpha": 1.0}},
            r"reference\.schedule: auto then, synced now",
        ),
    ],
)
def test_a_run_that_trains_other_weights_or_otherwise_goes_on_from_no_checkpoint(
    changed: dict[str, Any], named: str
) -> None:
    then = validate_config(SETTINGS)
    with pytest.raises(
        ConfigError, match=rf"checkpoint-4 cannot be resumed by this run: {named}.*Put it back"
    ):
        require_resumable(Path("checkpoint-4"), then, validate_config(SETTINGS | changed))


def test_a_reference_that_had_moved_is_not_left_behind() -> None:
    moving = SETTINGS | {"reference": {"schedule": "synced", "mixup_alpha": 1.0, "sync_steps": 2}}
    then = validate_config(moving)
    with pytest.raises(ConfigError, match=r"reference\.schedule: synced then, auto now\. What is saved"):
        require_resumable(Path(), then, validate_config(SETTINGS))
    later = validate_config(moving | {"reference": moving["reference"] | {"sync_steps": 3}})
    require_resumable(Path(), then, later)


def test_what_the_saved_state_does_not_depend_on_may_change() -> None:
    changed = {"optimizer": "adamw_torch", "learning_rate": 1e-4, "lora_dropout": 0.1}
    require_resumable(Path(), validate_config(SETTINGS), validate_config(SETTINGS | changed))


def test_a_later_format_is_named(tmp_path: Path) -> None:
    record().write(tmp_path)
    path = tmp_path / RECORD_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99, "version": "9.0"}))
    with pytest.raises(ConfigError, match=r"format 99, of Fiducial 9\.0"):
        read_record(tmp_path)


def changed(**fields: Any) -> dict[str, Any]:
    return IDENTITY | fields


def test_other_weights_are_another_reference() -> None:
    assert require_same_reference(record(), IDENTITY) == ()
    assert require_same_reference(record(reference=None), changed(weights="2")) == ()
    print_ = IDENTITY["fingerprint"]
    tensors = changed(weights="2", fingerprint=print_ | {"tensors": {"a.weight": "x", "b.weight": "z"}})
    with pytest.raises(ModelError, match=r"1 of 2 weights differ \(b.weight\)"):
        require_same_reference(record(), tensors)
    gone = changed(weights="2", fingerprint=print_ | {"tensors": {"a.weight": "x"}})
    with pytest.raises(ModelError, match=r"are only then \(b.weight\)"):
        require_same_reference(record(), gone)
    settings = changed(weights="2", fingerprint=print_ | {"settings": {"eps": 0.5, "theta": 2}})
    with pytest.raises(ModelError, match=r"eps of the config: 1.0 then, 0.5 now"):
        require_same_reference(record(), settings)
    with pytest.raises(ModelError, match=r"precision: float32 then, bfloat16 now"):
        require_same_reference(record(), changed(weights="2", dtype="bfloat16"))


def test_another_way_of_computing_the_same_weights_is_only_told() -> None:
    settings = {"eps": 1.0, "theta": 2, "of_a_later_version": None}
    now = changed(
        weights="2", autocast="bfloat16", fingerprint=IDENTITY["fingerprint"] | {"settings": settings}
    )
    found = changes(IDENTITY, now)
    assert found.another == ()
    assert [phrase.split(":")[0] for phrase in found.computed] == [
        "the precision of the products (bf16, fp16)",
        "of_a_later_version of the config is known only now",
    ]
    assert require_same_reference(record(), now) == found.computed


def test_a_finished_run_keeps_the_precision_that_was_decided_then(tmp_path: Path) -> None:
    cfg = validate_config(SETTINGS)  # an adapter's base: `auto`, whatever machine reads it
    assert (cfg.model.dtype, cfg.model.autocast) == ("auto", "auto")
    decided = cfg.model.model_copy(update={"dtype": "bfloat16", "autocast": "bfloat16"})
    record(run=cfg.model_copy(update={"model": decided})).write(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    found = from_config(cfg, tmp_path)
    assert (found.cfg.model.dtype, found.cfg.model.autocast) == ("bfloat16", "bfloat16")
    assert from_folder(tmp_path, ["seed=7"]).cfg == found.cfg.model_copy(
        update={"optimization": cfg.optimization.model_copy(update={"seed": 7})}
    )
    asked = cfg.model_copy(update={"model": cfg.model.model_copy(update={"dtype": "float32"})})
    assert from_config(asked, tmp_path).cfg.model.dtype == "float32"
