"""A transformers trainer that puts an adapter's saved weights into the adapter that is there."""

from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import Trainer

from fiducial.model.adapters import POLICY_ADAPTER


class AdapterTrainer(Trainer):
    """Loads checkpoints of adapters without building the adapters anew, others as transformers does."""

    def load_weights(self, folder: Path) -> None:
        """Put the weights (or the adapter) saved in `folder` into the model."""
        self._load_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As transformers does, but an adapter's tensors go into the adapter that is there.

        PEFT's `load_adapter` would prepare it again: PiSSA and OLoRA would decompose the base a second time.
        """
        policy = model if model is not None else self.model
        if not isinstance(policy, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = load_peft_weights(resume_from_checkpoint, device="cpu")
        set_peft_model_state_dict(policy, weights, adapter_name=POLICY_ADAPTER)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) and not self.is_fsdp_enabled:
            self.load_weights(Path(self.state.best_model_checkpoint or ""))
        else:
            super()._load_best_model()
