"""Which tokens end a completion.

EOS, the end-of-turn marks in common use as far as the tokenizer has them as tokens, and whatever tokens of
its own the chat template closes an assistant turn with. Not every special token: some close a tool call
inside an answer.
"""

from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from fiducial.data.example import Messages, OddRow
from fiducial.data.templates import ChatTemplate

MARKS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>")


def end_tokens(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> frozenset[int]:
    """The ids after which an answer is over."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    ends = {added[mark] for mark in MARKS if mark in added}
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    if template is not None:
        ends |= _closing(tokenizer, template) & set(added.values())
    return frozenset(ends)


def spelled_out(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The usual marks that `text` closes turns with and the tokenizer has no token for."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return [mark for mark in MARKS if mark in text and mark not in added]


def _closing(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> set[int]:
    """The ids that two different answers have in common at their end."""
    try:
        left, right = (_answered(tokenizer, template, answer) for answer in ("1", "b"))
    except OddRow:  # a template with demands of its own: EOS and the usual marks must do
        return set()
    pairs = zip(reversed(left), reversed(right), strict=False)
    return {token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)}


def _answered(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, answer: str) -> list[int]:
    messages: Messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": answer})
    text = template.render(messages, add_generation_prompt=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
