"""What text never passes through, in a model that reads pictures or sound too: towers, and what joins them.

No gradient reaches it, and processes that share gradients would wait for one in vain.
"""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from fiducial.model.logit_rule import backbone


def reads_text_alone(model: PreTrainedModel) -> bool:
    """Whether there are neither towers nor what joins them: its config has no part for text of its own."""
    return model.config.get_text_config() is model.config


def beside_text(model: PreTrainedModel) -> list[str]:
    """Names of the outermost modules with weights that text does not meet; none in a model of text alone."""
    if reads_text_alone(model):
        return []
    meets = [part for part in (backbone(model), model.get_output_embeddings()) if part is not None]
    reached = {id(parameter) for part in meets for parameter in part.parameters()}
    return list(_outside(model, reached, ""))


def freeze_beside_text(model: PreTrainedModel) -> None:
    """Train only what text passes through."""
    for name in beside_text(model):
        model.get_submodule(name).requires_grad_(False)


def _outside(module: nn.Module, reached: set[int], prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        inside = [id(parameter) in reached for parameter in child.parameters()]
        if inside and not any(inside):
            yield prefix + name
        elif not all(inside):
            yield from _outside(child, reached, f"{prefix}{name}.")
