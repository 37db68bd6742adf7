"""Settings of the optimizer and its schedule, tried before anything is loaded.

transformers reads from `optim_args` what the optimizer has a use for and passes the rest over; it makes the
schedule after the reference is scored. So both are made here for a moment, of one number.
"""

from enum import Enum
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from fiducial.errors import ConfigError


def check_optimizer_settings(args: TrainingArguments) -> None:
    """Make sure that every option of `args.optim_args` is read, and that the schedule can be made.

    Raises:
        ConfigError: an optimizer whose package is not installed, an option that it does not read or cannot
            use, or a schedule's that it lacks or does not know.
    """
    if isinstance(missing := _made(args, []), ImportError):
        raise ConfigError(f"optimizer: {_name(args.optim)} is not at hand: {missing}") from missing
    _check_options(args)
    _check_schedule(args)


def optimizer_options(options: str | dict[str, Any] | None) -> str | None:
    """`optim_args` as transformers reads them: `name=value,name=value`."""
    if isinstance(options, dict):
        return ",".join(f"{name}={value}" for name, value in options.items())
    return options


def _check_options(args: TrainingArguments) -> None:
    written = args.optim_args
    if not written:
        return
    options = [option.strip() for option in written.split(",")]
    malformed = [option for option in options if option.count("=") != 1]
    if malformed:
        raise ConfigError(f"optim_args: '{malformed[0]}' is not of the form name=value")
    without = _made(args, [])
    if isinstance(without, Exception):
        return  # it needs the model: told when it is made
    if isinstance(made := _made(args, options), Exception):
        raise ConfigError(f"optim_args: {_name(args.optim)} cannot use {written}: {made}") from made
    for option in options:
        # A value that is the default changes nothing either, so another one is tried as well.
        tried = [_made(args, [option]), _made(args, [f"{option}1"])]
        if all(each == without for each in tried):
            name = option.partition("=")[0]
            raise ConfigError(
                f"optim_args: {_name(args.optim)} does not read {name}, so it has no effect; remove it. "
                "Learning rate, betas, epsilon and weight decay have keys of their own."
            )


def _made(args: TrainingArguments, options: list[str]) -> Any:
    """The optimizer's class and arguments with these options, or what is raised for them."""
    written, args.optim_args = args.optim_args, ",".join(options)
    try:
        return Trainer.get_optimizer_cls_and_kwargs(args)
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        return error
    finally:
        args.optim_args = written


def _check_schedule(args: TrainingArguments) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=args.learning_rate)
    options = args.lr_scheduler_kwargs or {}
    assert isinstance(options, dict), "the run's own mapping"
    try:  # the numbers of steps are any: only whether it can be made matters
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 100, scheduler_specific_kwargs=options)
    except (ValueError, TypeError) as error:
        name = _name(args.lr_scheduler_type)
        raise ConfigError(
            f"lr_scheduler: {name} cannot be made with lr_scheduler_kwargs: {options}: {error}"
        ) from error


def _name(choice: str | Enum) -> str:
    return choice.value if isinstance(choice, Enum) else choice
