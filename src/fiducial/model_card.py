"""The model card: what was trained, on what, against which reference, and how it went.

Names are repeated as the user wrote them; no path of the machine is added.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fiducial._version import VERSION
from fiducial.config.schema import DatasetConfig, RunConfig
from fiducial.reference.plan import ReferencePlan

_TITLES = {
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected",
    "kl": "log-ratio to the reference (`kl`, nats a completion)",
    "loss": "loss",
}


def write_model_card(
    output_dir: str | Path,
    cfg: RunConfig,
    plan: ReferencePlan,
    metrics: Mapping[str, float],
    *,
    proof: str | None = None,
) -> Path:
    """Write README.md into `output_dir`.

    Args:
        output_dir: the folder of the trained model.
        cfg: the run.
        plan: how its reference was decided.
        metrics: final metrics by the names of metrics.jsonl; those on held-out data begin with `eval_`.
        proof: what was measured before step 1 about the reference, in a sentence.
    """
    card = Path(output_dir) / "README.md"
    front_matter = yaml.safe_dump(_front_matter(cfg), sort_keys=False, allow_unicode=True)
    sections = [
        _training(cfg),
        _data(cfg),
        _reference(plan, proof),
        _results(metrics, _unit(cfg)),
        f"Made with Fiducial {VERSION}.",
    ]
    card.write_text(
        f"---\n{front_matter}---\n\n" + "\n\n".join(filter(None, sections)) + "\n", encoding="utf-8"
    )
    return card


def _front_matter(cfg: RunConfig) -> dict[str, Any]:
    tags = ["fiducial", "preference-alignment", _method(cfg)]
    front: dict[str, Any] = {
        "base_model": cfg.model.base_model,
        "library_name": "transformers" if cfg.adapter is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": tags if cfg.adapter is None else [*tags, "lora"],
    }
    hub_datasets = [dataset.path for dataset in _datasets(cfg) if _is_hub_name(dataset)]
    return front | ({"datasets": hub_datasets} if hub_datasets else {})


def _training(cfg: RunConfig) -> str:
    title = cfg.output.run_name or f"{Path(cfg.model.base_model).name} aligned with {_title(cfg).upper()}"
    kind = "all weights" if cfg.adapter is None else f"a {_adapter(cfg)} adapter"
    settings = cfg.method.hyperparameters if cfg.method else {}
    rows = {
        "base model": f"`{cfg.model.base_model}`" + _at(cfg.model.revision),
        "trained": kind,
        "method": f"{_title(cfg)} ({', '.join(f'{name} {_short(each)}' for name, each in settings.items())})",
        "paper": cfg.method.paper if cfg.method else "",
        "learning rate": f"{cfg.optimization.learning_rate:g}, {cfg.optimization.lr_scheduler}",
        f"{_unit(cfg)}s a step and process": str(cfg.optimization.groups_per_step),
        "epochs": f"{cfg.optimization.num_epochs:g}",
        "longest sequence": f"{cfg.data.sequence_len} tokens" if cfg.data else "",
        "seed": str(cfg.optimization.seed),
    }
    return f"# {title}\n\n" + _table(("", ""), rows)


def _data(cfg: RunConfig) -> str:
    lines = [f"- `{dataset.path}`{_at(dataset.revision)}{_split(dataset)}" for dataset in _datasets(cfg)]
    return "## Preference data\n\n" + "\n".join(lines)


def _reference(plan: ReferencePlan, proof: str | None) -> str:
    when = f", {plan.schedule}" if plan.schedule else ""
    lines = [f"**{plan.source}**{when}. {plan.why}"]
    if plan.checkpoint is not None:
        lines.append(f"Its weights: `{plan.checkpoint.path}`{_at(plan.checkpoint.revision)}.")
    return "## Reference\n\n" + "\n\n".join(lines + ([proof] if proof else []))


def _results(metrics: Mapping[str, float], unit: str) -> str:
    parts = [
        f"## {title}\n\n" + _table(("metric", "value"), rows)
        for title, prefix in ((f"On held-out {unit}s", "eval_"), ("At the end of training", ""))
        if (rows := _known(metrics, prefix))
    ]
    return "\n\n".join(parts)


def _known(metrics: Mapping[str, float], prefix: str) -> dict[str, str]:
    return {
        title: f"{metrics[prefix + name]:.4g}" for name, title in _TITLES.items() if prefix + name in metrics
    }


def _table(header: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows.items() if value])


def _datasets(cfg: RunConfig) -> tuple[DatasetConfig, ...]:
    return cfg.data.datasets if cfg.data else ()


def _is_hub_name(dataset: DatasetConfig) -> bool:
    """`owner/name`, and neither a file nor a folder here nor a URL."""
    path = dataset.path
    return (
        path.count("/") == 1
        and not path.startswith((".", "/", "~"))
        and not Path(path).suffix
        and not Path(path).exists()
    )


def _adapter(cfg: RunConfig) -> str:
    assert cfg.adapter is not None
    if cfg.adapter.path is not None:
        return f"{cfg.adapter.kind} (continued from `{cfg.adapter.path}`)"
    return f"{cfg.adapter.kind} (rank {cfg.adapter.r}, alpha {cfg.adapter.alpha})"


def _method(cfg: RunConfig) -> str:
    return cfg.method.name if cfg.method else "none"


def _title(cfg: RunConfig) -> str:
    return cfg.method.title if cfg.method else "none"


def _unit(cfg: RunConfig) -> str:
    return cfg.method.unit if cfg.method else "group"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _at(revision: str | None) -> str:
    return f" at `{revision}`" if revision else ""


def _split(dataset: DatasetConfig) -> str:
    return f", split `{dataset.split}`" if dataset.split else ""
