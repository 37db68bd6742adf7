"""What the hub raises when a run is pushed there (`hub_model_id`), as one message with a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from fiducial.errors import TrainingError

REFUSED = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled)
"""No such name or right, no token, no network."""


@contextmanager
def pushing_explained(hub_model_id: str | None) -> Iterator[None]:
    """Inside, a push to `hub_model_id` that fails is a `TrainingError`; without one everything passes."""
    try:
        yield
    except REFUSED as error:
        if hub_model_id is None:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"hub_model_id: {hub_model_id} cannot be pushed to: {reason}. Log in with `hf auth login`, "
            "correct the name, or remove the key and push output_dir afterwards with `hf upload`."
        ) from error
