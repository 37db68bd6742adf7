"""Errors a user can cause and mend. Each says what is wrong, where, why, and what to do instead.

Our own broken invariants are `assert`s, not these.
"""


class FiducialError(Exception):
    """Something the user can mend; the command line prints it without a traceback, exit code 2."""


class ConfigError(FiducialError):
    """The run's YAML, or an override on the command line, is wrong."""


class PlanError(FiducialError):
    """The reference that was asked for would not be the reference the loss needs."""


class DataError(FiducialError):
    """A dataset, a row, a column, or a chat template is wrong."""


class ModelError(FiducialError):
    """A checkpoint, an adapter, or a tokenizer cannot be used."""


class ServerError(ModelError):
    """A model on a server cannot be asked: nobody answers, or it refuses."""


class CacheError(FiducialError):
    """Stored reference log-probs are missing, damaged, or belong to another reference."""


class TrainingError(FiducialError):
    """Training cannot go on: a moved reference, a loss that is not a number, a full disk."""
