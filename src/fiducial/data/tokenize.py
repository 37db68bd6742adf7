"""Token ids of a prompt and its completions.

The common-prefix rule. Prompt and prompt + completion are each rendered and tokenized as a whole; the
prompt's ids are the longest prefix of *ids* that all these agree on, and a completion is what follows it. So
a token that merges over the boundary, or a template that writes another header when it generates, only
shortens the prompt; text is never searched.

A completion ends in exactly one end token: the template's end of turn, or EOS where nothing else ends it.
BOS is the tokenizer's or the template's business, and never stands twice.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fiducial.data.ends import end_tokens
from fiducial.data.example import OddRow, PreferenceExample, Reason
from fiducial.data.templates import ChatTemplate
from fiducial.errors import DataError, ModelError

TokenIds = npt.NDArray[np.int32]
ExcessLength = Literal["drop", "truncate", "raise"]


@dataclass(frozen=True)
class TokenizedGroup:
    """One prompt and its K completions as token ids. Pairs are (chosen, rejected)."""

    prompt: TokenIds
    """At least one token: its last one predicts the first token of every completion."""
    completions: tuple[TokenIds, ...]
    """Each non-empty, end-of-sequence token included."""
    scores: tuple[float, ...] = ()
    """Each completion's rating, or 1 and -1 for desirable and undesirable; empty where the data has none."""

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


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A group, and what had to be done to it."""

    group: TokenizedGroup
    truncated: bool = False
    bos_removed: bool = False
    """The rendering began with two BOS; one was taken away."""


@dataclass(frozen=True)
class GroupTokenizer:
    """Turns examples into groups of token ids, with one template and one length limit."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    sequence_len: int
    excess_length: ExcessLength = "drop"
    _is_blank: dict[int, bool] = field(default_factory=dict, repr=False)

    def tokenize_example(self, example: PreferenceExample) -> Tokenized:
        """One example; raises `OddRow` where it cannot be a group."""
        [result] = self.tokenize_examples([example])
        if isinstance(result, OddRow):
            raise result
        return result

    def tokenize_examples(self, examples: Sequence[PreferenceExample]) -> list[Tokenized | OddRow]:
        """All examples with one call of the tokenizer for each kind of text (fast ones are parallel)."""
        renderings: list[list[str] | OddRow] = []
        for example in examples:
            try:
                renderings.append(self._render(example))
            except OddRow as odd:
                renderings.append(odd)
        results: list[Tokenized | OddRow] = []
        ids = iter(self._token_ids(examples, renderings))
        for example, rendering in zip(examples, renderings, strict=True):
            if isinstance(rendering, OddRow):
                results.append(rendering)
                continue
            prompt, *wholes = [next(ids) for _ in rendering]
            try:
                results.append(self._assemble(prompt, wholes, example))
            except OddRow as odd:
                results.append(odd)
        return results

    def _render(self, example: PreferenceExample) -> list[str]:
        """The prompt, then prompt + completion for each completion, as text."""
        example.check()
        prompt = example.prompt
        if isinstance(prompt, str):
            texts = [completion for completion in example.completions if isinstance(completion, str)]
            assert len(texts) == len(example.completions), "text prompts have text completions"
            return [prompt, *(prompt + text for text in texts)]
        if self.template is None:
            raise DataError(
                f"{example.dataset}: its rows are conversations, and the tokenizer has no chat template. "
                f"Name one with `chat_template:` (say chatml) or give its text in chat_template_jinja."
            )
        render = partial(self.template.render, tools=example.tools)
        wholes = [
            render((*prompt, *turns), add_generation_prompt=False)
            for turns in example.completions
            if not isinstance(turns, str)
        ]
        assert len(wholes) == len(example.completions), "conversations are completed by messages"
        return [render(prompt, add_generation_prompt=True), *wholes]

    def _token_ids(
        self, examples: Sequence[PreferenceExample], renderings: Sequence[list[str] | OddRow]
    ) -> list[TokenIds]:
        """Ids of all renderings, in order. Only plain text gets the tokenizer's special tokens."""
        flat = [
            (text, isinstance(example.prompt, str))
            for example, rendering in zip(examples, renderings, strict=True)
            if not isinstance(rendering, OddRow)
            for text in rendering
        ]
        ids: list[TokenIds] = [np.zeros(0, dtype=np.int32)] * len(flat)
        for is_plain in (True, False):
            places = [place for place, (_, plain) in enumerate(flat) if plain is is_plain]
            if not places:
                continue
            encoded = self.tokenizer(
                [flat[place][0] for place in places],
                add_special_tokens=is_plain,
                return_attention_mask=False,
                verbose=False,
            )
            for place, tokens in zip(places, encoded["input_ids"], strict=True):
                ids[place] = np.asarray(tokens, dtype=np.int32)
        return ids

    def _assemble(self, prompt: TokenIds, wholes: list[TokenIds], example: PreferenceExample) -> Tokenized:
        bos = self._bos
        bos_removed = bos is not None and len(prompt) > 1 and bool((prompt[:2] == bos).all())
        if bos_removed:
            prompt, wholes = prompt[1:], [whole[1:] for whole in wholes]
        shared = min(common_prefix_length(prompt, whole) for whole in wholes)
        completions = [self._end_once(whole[shared:]) for whole in wholes]
        prompt = prompt[:shared]
        if shared == 0:  # the first token already merges prompt and completion
            if bos is None:
                raise OddRow(Reason.NO_PREFIX)
            prompt = np.array([bos], dtype=np.int32)
        return self._fit(prompt, completions, example, bos_removed)

    def _fit(
        self, prompt: TokenIds, completions: list[TokenIds], example: PreferenceExample, bos_removed: bool
    ) -> Tokenized:
        longest = len(prompt) + max(map(len, completions))
        truncated = longest > self.sequence_len
        if truncated:
            if self.excess_length == "raise":
                raise DataError(
                    f"{example.dataset}, row {example.row}: {longest} tokens, and sequence_len is "
                    f"{self.sequence_len}. Raise it, or set excess_length_strategy to drop or truncate."
                )
            if self.excess_length == "drop":
                raise OddRow(Reason.LONG_PROMPT if len(prompt) >= self.sequence_len else Reason.LONG)
            prompt, completions = truncate(prompt, completions, sequence_len=self.sequence_len, bos=self._bos)
        if any(np.array_equal(one, other) for one, other in combinations(completions, 2)):
            raise OddRow(Reason.EQUAL, "as tokens")
        # Copies: a view would keep its whole rendering alive.
        group = TokenizedGroup(
            prompt.copy(), tuple(completion.copy() for completion in completions), example.scores
        )
        return Tokenized(group, truncated, bos_removed)

    def _end_once(self, completion: TokenIds) -> TokenIds:
        """Cut after the first end token of those that close the completion, or append EOS if none does."""
        end = None
        start = len(completion)
        while start and (completion[start - 1] in self._ends or self._blank(int(completion[start - 1]))):
            start -= 1
            if completion[start] in self._ends:
                end = start
        if not any(token not in self._ends for token in completion[:end]):
            raise OddRow(Reason.EMPTY_COMPLETION, "as tokens")
        if end is not None:
            return completion[: end + 1]
        if self._eos is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, so no completion could end. Name one with "
                "`special_tokens: {eos_token: …}`."
            )
        return np.concatenate([completion, np.array([self._eos], np.int32)])

    @cached_property
    def _bos(self) -> int | None:  # the tokenizer itself takes longer to say
        token: int | None = self.tokenizer.bos_token_id
        return token

    @cached_property
    def _eos(self) -> int | None:
        token: int | None = self.tokenizer.eos_token_id
        return token

    @cached_property
    def _ends(self) -> frozenset[int]:
        return end_tokens(self.tokenizer, self.template)

    def _blank(self, token: int) -> bool:
        if token not in self._is_blank:
            self._is_blank[token] = not str(self.tokenizer.decode([token])).strip()
        return self._is_blank[token]


def common_prefix_length(left: TokenIds, right: TokenIds) -> int:
    """How many leading ids agree."""
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length


def truncate(
    prompt: TokenIds, completions: Sequence[TokenIds], *, sequence_len: int, bos: int | None
) -> tuple[TokenIds, list[TokenIds]]:
    """Fit prompt + completion into `sequence_len` tokens.

    The prompt loses its oldest tokens first (BOS stays), down to half of `sequence_len`; only then are
    completions cut at their end, and a cut completion has no end token: the model must not learn to stop
    there.
    """
    assert sequence_len >= 2, "one token of prompt, one of completion"
    longest = max(map(len, completions))
    keep = min(len(prompt), max(sequence_len - longest, sequence_len // 2))
    if keep < len(prompt):
        tail = prompt[len(prompt) - keep :]
        prompt = np.concatenate([prompt[:1], tail[1:]]) if prompt[0] == bos else tail
    return prompt, [completion[: sequence_len - keep] for completion in completions]
