"""Answers of a live reference that are kept: written before each checkpoint.

A run killed after a checkpoint goes on from there, and asks again for rows it had seen before. What had not
been written would be scored anew, in other passes, and differ in the last bits.
"""

from transformers import TrainerCallback

from fiducial.reference.kept import Kept


class KeptRecords(TrainerCallback):
    """Writes what `kept` holds before the checkpoint that counts on it."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def before_checkpoint(self) -> None:
        """Write this process's records."""
        self.kept.flush()
