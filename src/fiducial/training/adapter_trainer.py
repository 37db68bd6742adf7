"""A transformers trainer that puts all saved weights into the model, or the adapter, that is there."""

from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, Trainer

from fiducial.model.adapters import POLICY_ADAPTER
from fiducial.model.trained_adapter import require_same_tensors
from fiducial.reference.checkpoint import CheckpointFiles, read_sharded_tensor_facts


class AdapterTrainer(Trainer):
    """Loads checkpoints of adapters without building the adapters anew, and of models under any names."""

    def load_weights(self, folder: Path) -> None:
        """Put the weights (or the adapter) saved in `folder` into the model."""
        self._load_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As transformers does, but an adapter goes into the one that is there, and no weight is left out.

        PEFT's `load_adapter` would prepare it again: PiSSA and OLoRA would decompose the base a second time.
        The trainer of transformers passes over weights whose names its models change while loading.

        Raises:
            ModelError: the adapter's weights are others than those of the one that is there.
        """
        policy: Any = model if model is not None else self.model
        if not self.is_fsdp_enabled and _is_renamed(policy, Path(resume_from_checkpoint)):
            saved = type(policy).from_pretrained(resume_from_checkpoint, dtype=policy.dtype)
            policy.load_state_dict(saved.state_dict())
            return
        if not isinstance(policy, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = load_peft_weights(resume_from_checkpoint, device="cpu")
        require_same_tensors(policy, weights, Path(resume_from_checkpoint))
        set_peft_model_state_dict(policy, weights, adapter_name=POLICY_ADAPTER)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As transformers does, but a tied weight, saved once under its other name, is not missing."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self.load_weights(Path(self.state.best_model_checkpoint or ""))


def _is_renamed(model: Any, folder: Path) -> bool:
    """Whether weights have other names in `folder` than in `model`, as GPT-NeoX's head and experts do."""
    if not isinstance(model, PreTrainedModel):
        return False
    stored = read_sharded_tensor_facts(CheckpointFiles("checkpoint", str(folder), None, folder), "model")
    return stored is not None and not stored.keys() <= model.state_dict().keys()
