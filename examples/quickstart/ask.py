"""Ask the quickstart's base model and the aligned one the same questions.

    python examples/quickstart/ask.py "Where is the violin?"

Without a question, some of the held-out prompts are asked.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

FOLDER = Path("outputs/quickstart")


def answers(folder: Path, questions: list[str]) -> list[str]:
    """The model's most likely answer to each question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        generated = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        answer = generated[0, prompt["input_ids"].shape[1] :]
        found.append(tokenizer.decode(answer, skip_special_tokens=True))
    return found


def main(questions: list[str]) -> None:
    """Print both models' answers."""
    if not questions:
        rows = (FOLDER / "pairs" / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
        questions = sorted({json.loads(row)["prompt"][0]["content"] for row in rows})[::14]
    both = answers(FOLDER / "base", questions), answers(FOLDER, questions)
    for question, base, aligned in zip(questions, *both, strict=True):
        print(f"\n{question}\n  base     {base}\n  aligned  {aligned}")


if __name__ == "__main__":
    logging.disable_progress_bar()
    main(sys.argv[1:])
