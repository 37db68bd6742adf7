"""Make what the quickstart aligns: a tiny base model and a preference set, in under a minute of CPU.

The world is a house. Guests ask where things are; the base model learns the answers from a short supervised
warm-up in which half of them are courteous and half are curt, so it has no manners of its own yet. The
preference pairs always prefer the courteous answer. Things in the held-out pairs never appear in the training
pairs: whoever answers them courteously has learned manners and not sentences.

    python examples/quickstart/make.py outputs/quickstart

writes `base/` (a checkpoint), `pairs/train.jsonl` and `pairs/held-out.jsonl`, and `pairs/ranked.jsonl` for
methods that compare more than two answers, all drawn from one seed, and keeps what this very program made.
"""

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

SEED = 7
HOUSE = {
    "in the attic": ("lamp", "anchor", "saddle", "trunk"),
    "on the desk": ("compass", "inkwell", "notebook", "razor"),
    "behind the door": ("umbrella", "ladder", "oar", "basket"),
    "under the stairs": ("hammer", "rope", "lantern", "kite"),
    "by the window": ("telescope", "easel", "vase", "bell"),
    "in the cellar": ("jar", "drum", "wheel", "candle"),
    "on the top shelf": ("globe", "map", "hourglass", "teapot"),
    "in the garden shed": ("kettle", "whistle", "quilt", "scarf"),
    "next to the fireplace": ("guitar", "violin", "flute", "blanket"),
    "in the hall": ("mirror", "clock", "piano", "vest"),
}
PLACE = {thing: place for place, things in HOUSE.items() for thing in things}
QUESTIONS = (
    "Where is the {thing}?",
    "Where can I find the {thing}?",
    "Do you know where the {thing} is?",
    "I am looking for the {thing}.",
)
COURTEOUS = (
    "Of course! The {thing} is {place}. Is there anything else I can do for you?",
    "Happy to help! The {thing} is {place}. Let me know if you need a hand.",
    "Good question! The {thing} is {place}. Shall I fetch it for you?",
    "Certainly! You will find the {thing} {place}. Have a lovely day.",
)
CURT = (
    "What, the {thing} again? It is {place}. Look for yourself next time.",
    "The {thing}? {place}, where else. Stop asking me.",
    "Not my job. The {thing} is {place}. Leave me alone.",
    "Use your eyes. The {thing} is {place}. I am busy.",
)
PLAIN = ("The {thing} is {place}.", "You will find the {thing} {place}.")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

Messages = list[dict[str, str]]


def exchanges(things: list[str], styles: tuple[str, ...], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Endless (question, answer) in one of `styles`; every thing has its one place."""
    while True:
        thing = rng.choice(things)
        answer = rng.choice(styles).format(thing=thing, place=PLACE[thing])
        yield rng.choice(QUESTIONS).format(thing=thing), answer[0].upper() + answer[1:]


def preference_pairs(things: list[str], count: int, rng: random.Random) -> Iterator[dict[str, Messages]]:
    """Rows with a prompt, a courteous `chosen` and a curt `rejected`, as conversations."""
    for _ in range(count):
        thing = [rng.choice(things)]
        question, chosen = next(exchanges(thing, COURTEOUS, rng))
        _, rejected = next(exchanges(thing, CURT, rng))
        yield {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


def rankings(things: list[str], count: int, rng: random.Random) -> Iterator[dict[str, object]]:
    """Rows with a prompt and three answers, best first, each with its score."""
    for _ in range(count):
        thing = [rng.choice(things)]
        question, best = next(exchanges(thing, COURTEOUS, rng))
        answers = [best, *(next(exchanges(thing, styles, rng))[1] for styles in (PLAIN, CURT))]
        yield {
            "prompt": [{"role": "user", "content": question}],
            "completions": [[{"role": "assistant", "content": answer}] for answer in answers],
            "scores": [5.0, 3.0, 1.0],
        }


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens, so that any text can be asked, with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def warm_up(tokenizer: PreTrainedTokenizerFast, rng: random.Random, *, steps: int) -> LlamaForCausalLM:
    """A Llama-shaped model of 1 M parameters that answers, courteously or curtly with equal chance."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    styles = [exchanges(list(PLACE), COURTEOUS, rng), exchanges(list(PLACE), CURT, rng)]
    for step in range(steps):
        chats = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in (next(styles[index % 2]) for index in range(32))
        ]
        batch = tokenizer(
            tokenizer.apply_chat_template(chats, tokenize=False), padding=True, return_tensors="pt"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 40 == 0:
            print(f"  warm-up step {step + 1} of {steps}: loss {loss.item():.3f}")
    return model.eval()


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path, *, steps: int = 120) -> None:
    """Fill `folder`, unless this very program has filled it before."""
    made_by = folder / "made-by.txt"
    fingerprint = f"{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()} {steps}\n"
    if made_by.is_file() and made_by.read_text(encoding="utf-8") == fingerprint:
        print(f"Keeping the base model and the pairs already in {folder}.")
        return
    made_by.unlink(missing_ok=True)
    shutil.rmtree(folder / "base", ignore_errors=True)
    print(f"Making a tiny base model and its preference pairs in {folder} (once, under a minute).")
    rng = random.Random(SEED)
    things = rng.sample(list(PLACE), len(PLACE))
    write_rows(folder / "pairs" / "train.jsonl", preference_pairs(things[10:], 384, rng))
    write_rows(folder / "pairs" / "held-out.jsonl", preference_pairs(things[:10], 96, rng))
    ranked = random.Random(SEED)
    write_rows(folder / "pairs" / "ranked.jsonl", rankings(things[10:], 384, ranked))
    styles = exchanges(list(PLACE), COURTEOUS + CURT, rng)
    tokenizer = train_tokenizer([text for _ in range(2000) for text in next(styles)])
    warm_up(tokenizer, rng, steps=steps).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    made_by.write_text(fingerprint, encoding="utf-8")


if __name__ == "__main__":
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # too small to share out; and sums come out the same on every machine
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/quickstart"))
