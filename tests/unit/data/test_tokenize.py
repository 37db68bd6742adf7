"""The common-prefix rule, begin and end tokens, and lengths, on tokenizers of several kinds."""

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fiducial.config.schema import TokenizerConfig
from fiducial.data.example import Content, OddRow, PreferenceExample, Reason
from fiducial.data.templates import choose_template
from fiducial.data.tokenize import GroupTokenizer, Tokenized, TokenizedGroup, truncate
from fiducial.errors import DataError, ModelError

TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] | trim)"
    " + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
OTHER_HEADER = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model:' }}{% endif %}"
)
NO_GENERATION_PROMPT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
TWO_ENDS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ eos_token }}{% endif %}"
)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def example(prompt: Content, *completions: Content) -> PreferenceExample:
    return PreferenceExample(prompt, completions, "rows.jsonl", 7)


def chat(prompt: str, *answers: str) -> PreferenceExample:
    return example((turn("user", prompt),), *((turn("assistant", answer),) for answer in answers))


def group_tokenizer(
    tokenizer: PreTrainedTokenizerFast, template: str | None = None, **options: Any
) -> GroupTokenizer:
    config = TokenizerConfig(chat_template_jinja=template)
    return GroupTokenizer(tokenizer, choose_template(config, tokenizer), **{"sequence_len": 4096, **options})


def texts(tokenizer: PreTrainedTokenizerFast, group: TokenizedGroup) -> tuple[str, ...]:
    return tuple(map(tokenizer.decode, (group.prompt, *group.completions)))


@pytest.mark.parametrize("answers", [("a", "1"), ("user", "assistant"), ("\n", "s"), ("im_start", "Hi")])
def test_short_answers_that_also_occur_in_the_header(
    byte_tokenizer: PreTrainedTokenizerFast, answers: tuple[str, str]
) -> None:
    """A search for the answer's text would find it in the template's header."""
    if not answers[0].strip():
        answers = ("\nx", answers[1])
    group = group_tokenizer(byte_tokenizer).tokenize_example(chat("Hi", *answers)).group
    assert texts(byte_tokenizer, group) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        f"{answers[0]}<|im_end|>",
        f"{answers[1]}<|im_end|>",
    )


@pytest.mark.parametrize(
    ("template", "prompt", "chosen"),
    [
        (TRIMMING, "<s><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n", "yes<|im_end|>"),
        (
            THINKING,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n",
            "\n</think>\n\n yes <|im_end|>",
        ),
        (OTHER_HEADER, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>", "assistant\n yes <|im_end|>"),
        (NO_GENERATION_PROMPT, "user: Hi\n", "assistant:  yes \n</s>"),
        (TWO_ENDS, "user: Hi<|im_end|>\nassistant: ", " yes <|im_end|>"),
    ],
)
def test_templates_with_ways_of_their_own(
    bos_tokenizer: PreTrainedTokenizerFast, template: str, prompt: str, chosen: str
) -> None:
    group = group_tokenizer(bos_tokenizer, template).tokenize_example(chat("Hi", " yes ", "no")).group
    assert texts(bos_tokenizer, group)[:2] == (prompt, chosen)


def test_boundary_merges_follow_the_whole_text(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenize = group_tokenizer(merging_tokenizer)
    prompt, chosen, rejected = "Q: 2+2? A:", " four", " ten"
    alone = merging_tokenizer(prompt)["input_ids"]
    whole = merging_tokenizer(prompt + chosen)["input_ids"]
    assert whole[: len(alone)] != alone, "the training text must make a merge that crosses the boundary"
    group = tokenize.tokenize_example(example(prompt, chosen, rejected)).group
    assert len(group.prompt) < len(alone)
    for completion, text in zip(group.completions, (chosen, rejected), strict=True):
        ids = [*group.prompt.tolist(), *completion.tolist()]
        assert ids == [*merging_tokenizer(prompt + text)["input_ids"], merging_tokenizer.eos_token_id]


def test_prompt_that_merges_away_becomes_bos(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenize = group_tokenizer(merging_tokenizer)
    assert len(merging_tokenizer(": f")["input_ids"]) == 1, "the training text must merge these characters"
    group = tokenize.tokenize_example(example(":", " five", " four")).group
    assert texts(merging_tokenizer, group)[0] == "<s>"
    assert texts(merging_tokenizer, group)[1] == ": five</s>"
    merging_tokenizer.bos_token = None
    with pytest.raises(OddRow) as odd:
        group_tokenizer(merging_tokenizer).tokenize_example(example(":", " five", " four"))
    assert odd.value.reason is Reason.NO_PREFIX


def test_bos_stands_once(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenize = group_tokenizer(bos_tokenizer, TRIMMING)
    rendered = tokenize.tokenize_example(chat("Hi", "yes", "no"))
    plain = tokenize.tokenize_example(example("Hi", " yes", " no"))
    doubled = tokenize.tokenize_example(example("<s>Hi", " yes", " no"))
    for result in (rendered, plain, doubled):
        assert result.group.prompt.tolist().count(256) == 1
        assert result.group.prompt[0] == 256
    assert [result.bos_removed for result in (rendered, plain, doubled)] == [False, False, True]
    assert np.array_equal(doubled.group.prompt, plain.group.prompt)


@pytest.mark.parametrize("ending", ["", "</s>", "</s>\n", "<|im_end|>", "<|im_end|>\n</s>", " \n"])
def test_exactly_one_end_token(byte_tokenizer: PreTrainedTokenizerFast, ending: str) -> None:
    group = group_tokenizer(byte_tokenizer).tokenize_example(example("Hi", f" yes{ending}", " no")).group
    ends = [token in (257, 260) for token in group.completions[0]]
    assert sum(ends) == 1
    assert ends[-1]


TOOL_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] + '<stop>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


def test_the_template_says_which_added_token_ends_a_turn(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """`<stop>` is no special token and `</call>` is one; only the template knows which ends a turn."""
    byte_tokenizer.add_tokens(["<stop>"])
    byte_tokenizer.add_tokens(["</call>"], special_tokens=True)
    group = group_tokenizer(byte_tokenizer, TOOL_CALLS).tokenize_example(chat("Hi", "f()</call>", "no")).group
    assert texts(byte_tokenizer, group)[1:] == ("f()</call><stop>", "no<stop>")


def test_an_end_token_inside_the_answer_stays(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    group = group_tokenizer(byte_tokenizer).tokenize_example(example("Hi", " a</s>b", " no")).group
    assert byte_tokenizer.decode(group.completions[0]) == " a</s>b</s>"


def test_tokenizer_that_appends_eos_to_every_text(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import processors

    byte_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    group = group_tokenizer(byte_tokenizer).tokenize_example(example("Hi", " yes", " no")).group
    assert texts(byte_tokenizer, group) == ("<s>Hi", " yes</s>", " no</s>")


def test_multi_turn_and_system_messages(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    history = (turn("system", "S"), turn("user", "a"), turn("assistant", "b"), turn("user", "c"))
    pair = example(history, (turn("assistant", "yes"),), (turn("assistant", "no"),))
    prompt, chosen, _ = texts(byte_tokenizer, group_tokenizer(byte_tokenizer).tokenize_example(pair).group)
    assert prompt.count("<|im_start|>") == 5
    assert prompt.endswith("c<|im_end|>\n<|im_start|>assistant\n")
    assert chosen == "yes<|im_end|>"


def test_batches_equal_single_examples(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenize = group_tokenizer(bos_tokenizer)
    examples = [
        chat("Hi", "yes", "no"),
        example("Q", " a", " a"),
        example("Q", " a", " b"),
        chat("!", "x", "y"),
    ]
    batch = tokenize.tokenize_examples(examples)
    assert isinstance(batch[1], OddRow)
    for result, each in zip(batch, examples, strict=True):
        if isinstance(result, Tokenized):
            assert result.group.keys == tokenize.tokenize_example(each).group.keys


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (example(" ", "a", "b"), Reason.EMPTY_PROMPT),
        (example("Hi", "", "b"), Reason.EMPTY_COMPLETION),
        (example("Hi", "</s>", "b"), Reason.EMPTY_COMPLETION),
        (example("Hi", "b", "b"), Reason.EQUAL),
        (example("Hi", "b", "b</s>"), Reason.EQUAL),
        (chat("Hi", " ", "b"), Reason.EMPTY_COMPLETION),
        (example((turn("user", "Hi"),), (), ()), Reason.NO_ASSISTANT),
        (example((turn("user", "Hi"),), (turn("user", "x"),), (turn("user", "y"),)), Reason.NO_ASSISTANT),
        (
            example(
                (turn("user", "Hi"), turn("assistant", "x")),
                (turn("assistant", "y"),),
                (turn("assistant", "x"),),
            ),
            Reason.ANSWERED,
        ),
        (
            example(
                (turn("user", "Hi"),),
                (turn("assistant", "x"), turn("user", "z"), turn("assistant", "x")),
                (turn("assistant", "y"),),
            ),
            Reason.DIVERGED,
        ),
    ],
)
def test_odd_rows(byte_tokenizer: PreTrainedTokenizerFast, pair: PreferenceExample, reason: Reason) -> None:
    with pytest.raises(OddRow) as odd:
        group_tokenizer(byte_tokenizer).tokenize_example(pair)
    assert odd.value.reason is reason


@pytest.mark.parametrize("answers", [("yes", " yes "), ("yes", "no", " yes ")])
def test_answers_equal_after_a_template_trims_them(
    byte_tokenizer: PreTrainedTokenizerFast, answers: tuple[str, ...]
) -> None:
    with pytest.raises(OddRow) as odd:
        group_tokenizer(byte_tokenizer, TRIMMING).tokenize_example(chat("Hi", *answers))
    assert odd.value.reason is Reason.EQUAL


def test_lengths_drop_raise_truncate(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    long_answer, long_prompt = example("0123456789", " 123456789", " no"), example("x" * 40, " yes", " no")

    def tokenize(pair: PreferenceExample, excess: str) -> Tokenized:
        return group_tokenizer(bos_tokenizer, sequence_len=12, excess_length=excess).tokenize_example(pair)

    for pair, reason in ((long_answer, Reason.LONG), (long_prompt, Reason.LONG_PROMPT)):
        with pytest.raises(OddRow) as odd:
            tokenize(pair, "drop")
        assert odd.value.reason is reason
        with pytest.raises(DataError, match=r"rows.jsonl, row 7: .* sequence_len is 12"):
            tokenize(pair, "raise")
    cut = tokenize(long_answer, "truncate")
    assert cut.truncated
    assert texts(bos_tokenizer, cut.group) == ("<s>56789", " 12345", " no</s>")
    kept = tokenize(long_prompt, "truncate")
    assert texts(bos_tokenizer, kept.group) == ("<s>xxxxxx", " yes</s>", " no</s>")


def test_a_row_of_sequence_len_fits_and_a_prompt_of_it_leaves_no_room(
    bos_tokenizer: PreTrainedTokenizerFast,
) -> None:
    pair = example("Hi", " yes", " no")  # BOS, 2, 4 and EOS

    def tokenize(sequence_len: int, excess: str) -> Tokenized:
        limited = group_tokenizer(bos_tokenizer, sequence_len=sequence_len, excess_length=excess)
        return limited.tokenize_example(pair)

    for excess in ("drop", "raise", "truncate"):
        assert not tokenize(8, excess).truncated
    assert tokenize(7, "truncate").truncated
    for sequence_len, reason in ((7, Reason.LONG), (4, Reason.LONG), (3, Reason.LONG_PROMPT)):
        with pytest.raises(OddRow) as odd:
            tokenize(sequence_len, "drop")
        assert odd.value.reason is reason


@pytest.mark.parametrize("sequence_len", [2, 3, 8, 17])
@pytest.mark.parametrize("lengths", [(1, 40, 2), (40, 1, 1), (40, 40, 40), (9, 9, 1)])
def test_truncated_groups_fit_and_keep_both_sides(sequence_len: int, lengths: tuple[int, int, int]) -> None:
    prompt, *completions = [np.arange(length, dtype=np.int32) for length in lengths]
    kept_prompt, kept = truncate(prompt, completions, sequence_len=sequence_len, bos=None)
    assert len(kept_prompt) >= min(len(prompt), sequence_len // 2)
    assert prompt[-1] == kept_prompt[-1]
    for before, after in zip(completions, kept, strict=True):
        assert len(kept_prompt) + len(after) <= sequence_len
        assert np.array_equal(before[: len(after)], after)
        assert len(after) >= 1


def test_truncation_that_makes_answers_equal_is_odd(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenize = group_tokenizer(bos_tokenizer, sequence_len=8, excess_length="truncate")
    with pytest.raises(OddRow) as odd:
        tokenize.tokenize_example(example("Hi", " same start, one", " same start, two"))
    assert odd.value.reason is Reason.EQUAL


def test_conversations_without_a_template(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template.*`chat_template:`"):
        group_tokenizer(byte_tokenizer).tokenize_example(chat("Hi", "yes", "no"))


def test_tokenizer_without_eos(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        group_tokenizer(byte_tokenizer).tokenize_example(example("Hi", " yes", " no"))
