"""A row of every format, and the texts that its token ids decode to."""

from dataclasses import dataclass, field
from typing import Any

USER = {"role": "user", "content": "Hi"}
CHAT_PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
YES, NO = "yes<|im_end|>", "no<|im_end|>"


def turn(content: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": content}


def said(value: str, who: str = "gpt") -> dict[str, str]:
    return {"from": who, "value": value}


@dataclass(frozen=True)
class Example:
    row: dict[str, Any]
    texts: tuple[str, ...]
    auto: bool = False
    options: dict[str, Any] = field(default_factory=dict)


CHATS = {"chosen": [USER, turn("yes")], "rejected": [USER, turn("no")]}
CHAT_TEXTS = (CHAT_PROMPT, YES, NO)
LLAMA3_PROMPT = (
    "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
CHATML_PROMPT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
)


def named(prefix: str, prompt: str, end: str) -> dict[str, Example]:
    texts = (prompt, f"4{end}", f"5{end}")
    answers = {"chosen": "4", "rejected": "5", "system": "Be brief."}
    system, question = turn("Be brief.", "system"), turn("2+2?", "user")
    return {
        f"{prefix}.default": Example(
            {"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5", "system": "Be brief."},
            texts,
        ),
        f"{prefix}.argilla": Example(
            {"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5", "system": "Be brief."},
            texts,
        ),
        f"{prefix}.argilla_chat": Example(
            {"chosen": [system, question, turn("4")], "rejected": [system, question, turn("5")]}, texts
        ),
        f"{prefix}.icr": Example({"input": "2+2?", **answers}, texts),
        f"{prefix}.intel": Example({"question": "2+2?", **answers}, texts),
        f"{prefix}.prompt_pairs": Example({"prompt": "2+2?", **answers}, texts),
        f"{prefix}.ultra": Example(
            {
                "prompt": "2+2?",
                "system": "Be brief.",
                "chosen": [question, turn("4")],
                "rejected": [question, turn("5")],
            },
            texts,
        ),
    }


def named_single(prefix: str, prompt: str, end: str) -> dict[str, Example]:
    texts = (prompt, f"4{end}")
    answer = {"completion": "4", "label": True, "system": "Be brief."}
    chat = [turn("Be brief.", "system"), turn("2+2?", "user"), turn("4")]
    return {
        f"{prefix}.argilla": Example({"instruction": "2+2?", **answer}, texts),
        f"{prefix}.argilla_chat": Example({"completion": chat, "label": True}, texts),
        f"{prefix}.intel": Example({"question": "2+2?", **answer}, texts),
        f"{prefix}.prompt_pairs": Example({"prompt": "2+2?", **answer}, texts),
        f"{prefix}.ultra": Example({"prompt": "2+2?", **answer}, texts),
    }


EXAMPLES: dict[str, Example] = {
    "trl.explicit": Example(
        {"prompt": "Q: 2+2?\nA:", "chosen": " 4", "rejected": " 5"},
        ("Q: 2+2?\nA:", " 4</s>", " 5</s>"),
        auto=True,
    ),
    "trl.explicit_chat": Example(
        {"prompt": [USER], "chosen": [turn("yes")], "rejected": [turn("no")]}, CHAT_TEXTS, auto=True
    ),
    "trl.implicit": Example(
        {"chosen": "The sky is blue.", "rejected": "The sky is bleak."},
        ("The sky is", " blue.</s>", " bleak.</s>"),
        auto=True,
    ),
    "trl.implicit_chat": Example(CHATS, CHAT_TEXTS, auto=True),
    "sharegpt": Example(
        {"conversations": [said("Hi", "human")], "chosen": said("yes"), "rejected": said("no")},
        CHAT_TEXTS,
        auto=True,
    ),
    "hh": Example(
        {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
        ("\n\nHuman: Hi\n\nAssistant:", " yes</s>", " no</s>"),
        auto=True,
    ),
    "hh.chat": Example(
        {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
        CHAT_TEXTS,
    ),
    "chat_template.default": Example(
        {"messages": [USER], "chosen": turn("yes"), "rejected": turn("no")}, CHAT_TEXTS, auto=True
    ),
    "chat_template.argilla_chat": Example(CHATS, CHAT_TEXTS),
    "chat_template.argilla": Example(
        {**CHATS, "system": "Be brief."},
        ("<|im_start|>system\nBe brief.<|im_end|>\n" + CHAT_PROMPT, YES, NO),
    ),
    **named("chatml", CHATML_PROMPT, "<|im_end|>"),
    # The tiny tokenizer has no <|eot_id|> token: to it the mark is text, and EOS ends the completion.
    **named("llama3", LLAMA3_PROMPT, "<|eot_id|></s>"),
    "zephyr.nectar": Example(
        {
            "prompt": "2+2?",
            "answers": [
                {"answer": "five", "rank": 2.0},
                {"answer": "six", "rank": 3.0},
                {"answer": "four", "rank": 1.0},
            ],
        },
        ("<|system|>\n</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n", "four</s>", "five</s>"),
    ),
    "ranked.default": Example(
        {"prompt": "2+2?", "completions": [" 5", " 4", " 6"], "scores": [0.5, 1, -2]},
        ("2+2?", " 4</s>", " 5</s>", " 6</s>"),
        auto=True,
    ),
    "ranked.best_and_worst": Example(
        {"prompt": "2+2?", "completions": [" 5", " 4", " 6"], "scores": [0.5, 1, -2]},
        ("2+2?", " 4</s>", " 6</s>"),
    ),
    "passthrough": Example(
        {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}, ("2+2?", " 4</s>", " 5</s>")
    ),
    "user_defined.default": Example(
        {"ask": "2+2?", "good": "4", "bad": "5"},
        ("{} Q: 2+2?\nA:", " 4</s>", " 5!</s>"),
        options={
            "type": {
                "field_prompt": "ask",
                "field_chosen": "good",
                "field_rejected": "bad",
                "prompt_format": "{{}}{system} Q: {prompt}\nA:",
                "chosen_format": " {chosen}",
                "rejected_format": " {rejected}!",
            }
        },
    ),
    "kto.trl": Example(
        {"prompt": "Q: 2+2?\nA:", "completion": " 4", "label": True}, ("Q: 2+2?\nA:", " 4</s>"), auto=True
    ),
    "kto.trl_chat": Example(
        {"prompt": [USER], "completion": [turn("yes")], "label": True}, (CHAT_PROMPT, YES), auto=True
    ),
    "kto.sharegpt": Example(
        {"conversations": [said("Hi", "human"), said("yes")], "kto_tag": True}, (CHAT_PROMPT, YES), auto=True
    ),
    "kto.chat_template.default": Example(
        {"messages": [USER, turn("yes")], "label": True}, (CHAT_PROMPT, YES), auto=True
    ),
    **named_single("kto.chatml", CHATML_PROMPT, "<|im_end|>"),
    **named_single("kto.llama3", LLAMA3_PROMPT, "<|eot_id|></s>"),
    "kto.user_defined.default": Example(
        {"ask": "2+2?", "said": "4", "good": True},
        ("{} Q: 2+2?\nA:", " 4!</s>"),
        options={
            "type": {
                "field_prompt": "ask",
                "field_completion": "said",
                "field_label": "good",
                "prompt_format": "{{}}{system} Q: {prompt}\nA:",
                "completion_format": " {completion}!",
            }
        },
    ),
}
"""The single completions are all desirable."""
