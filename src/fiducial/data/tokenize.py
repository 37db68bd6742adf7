"""Token ids of a prompt and its completions."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenizedGroup:
    """One prompt and its K completions as token ids. Pairs are (chosen, rejected)."""

    prompt: TokenIds
    """At least one token: its last one predicts the first token of every completion."""
    completions: tuple[TokenIds, ...]
    """Each non-empty, end-of-sequence token included."""

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """A content key for each completion: equal tokens after an equal prompt, equal key, in any run."""
        prompt = hashlib.blake2b(self.prompt.tobytes(), digest_size=16).digest()
        return tuple(
            hashlib.blake2b(prompt + completion.tobytes(), digest_size=16).hexdigest()
            for completion in self.completions
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the group when its prompt is stored once."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + completion."""
        return len(self.prompt) + max(len(completion) for completion in self.completions)
