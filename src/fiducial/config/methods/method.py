"""What every preference method's config says of itself."""

from typing import Any, ClassVar

from fiducial.config.section import Section


class MethodConfig(Section):
    """Hyperparameters of one preference loss.

    A user writes `rl: <name>`; the losses of a family are written `rl: <family>` and
    `<family>_loss_type: <loss_type>`, and the one whose name is the family's is what `rl` alone means.
    """

    family: ClassVar[str | None] = None
    """The family it belongs to, such as `dpo`; None if `rl` names it."""
    loss_type: ClassVar[str | None] = None
    """What it is called in its family."""
    needs_reference: ClassVar[bool]
    """Whether the loss reads the reference's log-probs."""
    paired: ClassVar[bool] = True
    """Whether it compares completions of one prompt (chosen, rejected) or takes labelled single ones."""
    num_completions: ClassVar[int | None] = 2
    """How many completions of a prompt it compares, where it does; None is two or more."""
    needs_scores: ClassVar[bool] = False
    """Whether it reads how good each completion is, not only which is better."""
    needs_distribution: ClassVar[bool] = False
    """Whether it reads the reference's probability of every token of the vocabulary."""
    mismatched: ClassVar[bool] = False
    """Whether it also reads completions of other prompts, to estimate how far the policy has moved."""
    paper: ClassVar[str]
    summary: ClassVar[str]
    """What the loss optimises, in one sentence."""

    @classmethod
    def written(cls) -> str:
        """How a user asks for it, as `rl: dpo, dpo_loss_type: hinge`."""
        name = cls.model_fields["name"].default
        if cls.family in (None, name):
            return f"rl: {name}"
        return f"rl: {cls.family}, {cls.family}_loss_type: {cls.loss_type}"

    @property
    def title(self) -> str:
        """Its name in a sentence or a heading."""
        return str(self.model_dump()["name"])

    @property
    def unit(self) -> str:
        """What it learns from one of: a pair, a list of several completions, or a single completion."""
        if not self.paired:
            return "completion"
        return "pair" if self.num_completions == 2 else "list"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Everything set for it, by field; modifiers that are off are left out."""
        return self.model_dump(exclude={"name"}, exclude_none=True)

    @property
    def is_constant(self) -> bool:
        """Whether a beta of 0 takes the preference, and with it the reference, out of the loss."""
        return self.model_dump().get("beta") == 0
