"""A trained adapter merged into its base model: one checkpoint that any program can load without PEFT.

Sums are made in float32, on the CPU, and saved in the base checkpoint's own dtype. Under QLoRA the adapter is
merged into the base as it was before quantisation, as is usual: the quantised one is a rounded copy of it.
"""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fiducial.config.schema import AdapterConfig, RunConfig
from fiducial.errors import ConfigError, ModelError
from fiducial.finished import FinishedRun, from_config
from fiducial.model.adapters import merge_into_base
from fiducial.model.checkpoint import read_config
from fiducial.model.generation import make_savable
from fiducial.model.loader import ModelLoader
from fiducial.model.tokenizer import load_tokenizer
from fiducial.offline import kept_to_cache
from fiducial.policy_base import require_stored_base
from fiducial.reference.adapter_facts import read_adapter_facts
from fiducial.reference.facts import gather_facts
from fiducial.reference.plan import Checkpoint, Source, plan_reference
from fiducial.reference.predicted import predict_identity
from fiducial.run_record import require_same_reference
from fiducial.training.checkpoints import is_full_disk
from fiducial.training.output_folder import make_folder


def merge_adapter(cfg: RunConfig, output: Path | None = None) -> Path:
    """Merge the adapter in the run's `output_dir` into the base, and save model and tokenizer.

    Args:
        cfg: the run that trained the adapter.
        output: where to write; `output_dir`/merged by default.

    Returns:
        The folder that was written.

    Raises:
        ConfigError: the run trains no adapter, or `output` would replace what is merged or cannot be written.
        ModelError: there is no trained adapter, another run left it, or it was trained on another base.
    """
    with kept_to_cache(cfg):
        return _merge(cfg, output)


def merge_finished(finished: FinishedRun, output: Path | None = None) -> Path:
    """As `merge_adapter`, of a run's output folder or one of its checkpoints."""
    written = finished.cfg.output.model_copy(update={"output_dir": str(finished.folder)})
    return merge_adapter(finished.cfg.model_copy(update={"output": written}), output)


def _merge(cfg: RunConfig, output: Path | None) -> Path:
    trained = Path(cfg.output.output_dir)
    target = output or trained / "merged"
    adapter = _trained_adapter(cfg, trained)
    _keep_sources(target, cfg, trained)
    _require_unshared_layers(cfg, trained)
    base = _base_in_full(cfg)
    make_folder(target, "--output", adapter=False)

    run = _in_full_precision(cfg, adapter, trained)
    tokenizer = load_tokenizer(run)
    _require_base_of_then(cfg, trained, tokenizer)
    policy, _ = ModelLoader(run, tokenizer).load()
    assert isinstance(policy, PeftModel)
    merged: Any = merge_into_base(policy, f"the adapter in {trained}")
    make_savable(merged, cfg.model.base_model)
    _save(merged.to(base.dtype or merged.dtype), tokenizer, target)
    return target


def _require_unshared_layers(cfg: RunConfig, trained: Path) -> None:
    """Refuse an adapter whose layers hold one weight of the base several times."""
    if read_adapter_facts(str(trained), allow_pickle=cfg.model.allow_pickle_weights).layer_replication:
        raise ModelError(
            f"output_dir: the adapter in {trained} stacks layers of the base that share weights "
            "(peft_layer_replication), and merging it would change all of them. Load it with PEFT."
        )


def _base_in_full(cfg: RunConfig) -> PreTrainedConfig:
    """The base's config; `ModelError` where its weights are quantised."""
    base = read_config(Checkpoint(cfg.model.base_model, cfg.model.revision), cfg.model, {})
    if getattr(base, "quantization_config", None) is not None:
        raise ModelError(
            f"base_model: {cfg.model.base_model} holds quantised weights, and merging would round them "
            "again. Name the checkpoint it was made from, or load the adapter beside it."
        )
    return base


def _in_full_precision(cfg: RunConfig, adapter: AdapterConfig, trained: Path) -> RunConfig:
    """The run that resumes what was trained, in float32 and with the tokenizer saved beside it."""
    has_tokenizer = (trained / "tokenizer_config.json").is_file()
    tokenizer = cfg.tokenizer.model_copy(update={"path": str(trained)} if has_tokenizer else {})
    full_precision = {
        "dtype": "float32",
        "autocast": None,
        "load_in_8bit": False,
        "load_in_4bit": False,
        "gradient_checkpointing": False,
    }
    model = cfg.model.model_copy(update=full_precision)
    return cfg.model_copy(update={"model": model, "adapter": adapter, "tokenizer": tokenizer})


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    try:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except Exception as error:  # every writer has its own exception type; all others pass on unchanged
        if not is_full_disk(error):
            raise
        raise ModelError(
            f"the disk that holds {target} is full, and the model there is incomplete. Make room, or name "
            "another folder with --output."
        ) from error


def _trained_adapter(cfg: RunConfig, trained: Path) -> AdapterConfig:
    if cfg.adapter is None:
        raise ConfigError(
            f"adapter: not set, so this run trains all weights and {trained} already holds a whole model. "
            "There is nothing to merge."
        )
    if not (trained / "adapter_config.json").is_file():
        raise ModelError(f"output_dir: {trained} holds no trained adapter. Run `fiducial train` first.")
    return cfg.adapter.model_copy(update={"path": str(trained)})


def _require_base_of_then(cfg: RunConfig, trained: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ModelError` where the base's files are not those the adapter was trained on, as far as known.

    `run.json` knows the base by itself where the reference was the policy with its adapter off, or not over
    the base at all.
    """
    finished = from_config(cfg, trained)
    if finished.record is not None:
        require_stored_base(finished.record, finished.cfg, tokenizer)
    if finished.record is None or finished.record.reference is None or _begins_elsewhere(cfg):
        return
    plan = plan_reference(finished.cfg, gather_facts(finished.cfg))
    if plan.source is not Source.ADAPTER_OFF:
        return
    now = predict_identity(finished.cfg, plan, tokenizer)
    if now is not None:
        require_same_reference(finished.record, now.as_dict())


def _begins_elsewhere(cfg: RunConfig) -> bool:
    """Whether the reference is another policy than the base: what it was need not be there for merging."""
    asked, resumed = cfg.reference, cfg.adapter is not None and cfg.adapter.path is not None
    return resumed or any(other is not None for other in (asked.model, asked.adapter, asked.endpoint))


def _keep_sources(target: Path, cfg: RunConfig, trained: Path) -> None:
    """Refuse to write over the base or the adapter."""
    sources = {"base_model": Path(cfg.model.base_model), "output_dir": trained}
    for key, source in sources.items():
        if target.resolve() == source.resolve():
            raise ConfigError(f"--output: {target} is the run's {key}, which is merged. Name another folder.")
