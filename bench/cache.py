"""What the cache of reference log-probs costs and saves: starting with it full, and filling it.

    python bench/cache.py                     # about 5 minutes; writes bench/results/cache.json
    python bench/cache.py --quick             # shows that it runs, no more

Warm start: `fiducial train` on 60 000 pairs of text whose reference log-probs are in the cache already, in a
process of its own, from its first instruction to its first optimizer step. The pairs are made of invented
words, as long as *hh*'s. The model gives every token the same probability, so that the records can be written
without scoring them for hours, and are still true where the run scores a few again.

Cold scoring: the reference's pass over the data as a share of one training epoch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: look for modules in the repository, not beside this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from bench.arena import CONSOLE, FIDUCIAL, HERE, FailedError, Setting, compare, report, write
from bench.measure import resident_peak
from bench.shapes import SHAPES, config
from bench.workload import DATA, available, make

MERGES = 8_000
LONGEST = 1024
FEW = 64
"""Pairs of the run whose memory the others' is compared with."""


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = _options(arguments)
    if options.start is not None:
        return _start(json.loads(options.start.read_text()), options.result)
    warm = measure_warm_start(options)
    CONSOLE.print(_warm_table(warm))
    cold = [_cold(options, name) for name in ("hh", "long")]
    for each in cold:
        CONSOLE.print(f"cold scoring on {each['data']}: {each['share_of_an_epoch']:.2f} of a training epoch")
    command = ["python", "bench/cache.py", *arguments]
    write(options.output, report(command, options.shape, warm=warm, cold=cold))
    return 0


def measure_warm_start(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes until the first step, with the data's tokens kept from an earlier run and without."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = _run(folder, options)
        with CONSOLE.status("filling the cache"):
            facts = _fill(settings, options.files)
        prepared = settings | {"dataset_prepared_path": str(folder / "prepared")}
        few = settings | {"datasets": [settings["datasets"][0] | {"split": f"train[:{FEW}]"}]}
        starts = {
            "few pairs": _measure(folder, few),
            "tokens kept, first time": _measure(folder, prepared),
            "tokens kept": _measure(folder, prepared),
            "tokens made anew": _measure(folder, settings),
        }
    base = starts.pop("few pairs")
    weights = facts.pop("model_bytes")
    return facts | {
        "model_bytes": weights,
        "few_pairs": base | {"pairs": FEW},
        "starts": {name: each for name, each in starts.items() if name != "tokens kept, first time"},
    }


def _run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint and pairs on disk, and a run that trains on them."""
    rng = np.random.default_rng(0)
    words = _words(rng)
    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in _rows(options.pairs, words, rng))
    _save_checkpoint(folder / "model", options.shape, _tokenizer(path))
    return {
        "base_model": str(folder / "model"),
        "rl": "dpo",
        "datasets": [{"path": str(path)}],
        "sequence_len": LONGEST,
        "micro_batch_size": 8,
        "max_steps": 1,
        "save_strategy": "no",
        "output_dir": str(folder / "out"),
        "reference": {"cache": str(folder / "references")},
    }


def _words(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Invented words, of which the first are the most frequent ones and the shortest."""
    syllables = [first + second for first in "bdfgklmnprstvz" for second in ("a", "e", "i", "o", "u", "an")]
    sizes = 1 + np.arange(20_000) // 5_000
    return np.array(["".join(rng.choice(syllables, size)) for size in sizes])


def _rows(number: int, words: np.ndarray[Any, Any], rng: np.random.Generator) -> Iterator[dict[str, str]]:
    """Pairs whose prompt and completions are as long as *hh*'s; a word is a little more than a token."""

    def text(median: int, spread: float) -> str:
        size = min(max(1, round(median / 1.4 * np.exp(spread * rng.standard_normal()))), 350)
        chosen = (rng.zipf(1.2, size) - 1) % len(words)
        return " ".join(words[chosen])

    prompt, (chosen, rejected) = DATA["hh"].prompt, DATA["hh"].completions
    for row in range(number):
        yield {
            "prompt": f"{row} {text(*prompt)}",
            "chosen": f" {text(*chosen)}",
            "rejected": f" no {text(*rejected)}",
        }


def _tokenizer(path: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    with path.open() as file:
        sample = [json.loads(line)["prompt"] for line, _ in zip(file, range(4000), strict=False)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=MERGES, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def _save_checkpoint(folder: Path, shape: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights whose head says 0 for every token: each has the same probability."""
    torch.manual_seed(0)
    settings = config(shape, longest=2 * LONGEST)
    settings.vocab_size = max(settings.vocab_size, len(tokenizer))
    model = LlamaForCausalLM(settings)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fill(settings: dict[str, Any], files: int) -> dict[str, Any]:
    """The records of every completion, in so many files."""
    from fiducial.data.dataset import TokenizedDataset
    from fiducial.prepare import read_run
    from fiducial.reference.cache.opening import open_store
    from fiducial.reference.predicted import predict_identity

    run = read_run(settings, Console(quiet=True))
    identity = predict_identity(run.cfg, run.plan, run.tokenizer)
    assert identity is not None, "the checkpoint's files tell"
    assert isinstance(run.data.train, TokenizedDataset)
    store = open_store(run.cfg, identity, tell=CONSOLE.print)
    log_prob = -np.log(np.float32(run.facts.model.sizes.vocab_size)).astype(np.float32)
    tokens, edge = 0, 0
    for number in range(len(run.data.train)):
        group = run.data.train[number]
        for key, completion in zip(group.keys, group.completions, strict=True):
            store.put(key, np.full(len(completion), log_prob, np.float32), group)
        tokens += group.num_tokens
        if number * files // len(run.data.train) > edge:
            edge += 1
            store.flush()
    store.flush()
    held = sum(path.stat().st_size for path in store.folder.iterdir())
    return {
        "pairs": len(run.data.train),
        "tokens_a_pair": tokens / len(run.data.train),
        "files": len(list(store.folder.glob("*.arrow"))),
        "cache_bytes": held,
        "model_bytes": 4 * run.facts.model.num_parameters,
    }


def _measure(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One start in a process of its own."""
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps(settings))
    program = [sys.executable, __file__, "--start", str(job), "--result", str(result)]
    done = subprocess.run(program, check=False, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise FailedError(done.stderr[-3000:])
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured


class FirstStep(TrainerCallback):
    """Writes down when the first optimizer step begins, and the most memory that was resident until then."""

    def __init__(self, path: Path, imported: float) -> None:
        self.path = path
        self.imported = imported

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before anything of the step."""
        process = psutil.Process()
        times = process.cpu_times()
        measured = {
            "seconds": time.time() - process.create_time(),
            "seconds_of_imports": self.imported - process.create_time(),
            "processor_seconds": times.user + times.system,
            "peak_bytes": resident_peak(),
        }
        self.path.write_text(json.dumps(measured))


def _start(settings: dict[str, Any], result: Path) -> int:
    """`fiducial train`, watched."""
    from fiducial import assembly
    from fiducial.train import train

    first = FirstStep(result, imported=time.time())
    assembly.setting_callbacks = lambda cfg: [first]
    train(settings, console=Console(quiet=True))
    return 0


def _cold(options: argparse.Namespace, name: str) -> dict[str, Any]:
    workload = make(
        name,
        generated=options.quick or not available(),
        vocab_size=SHAPES[options.shape]["vocab_size"],
        max_length=LONGEST if options.quick else 2048,
        warmup=1,
        steps=options.steps,
    )
    setting = Setting(options.shape, workload, "float32", isolated=not options.quick)
    row = compare(setting, [FIDUCIAL])["contestants"][FIDUCIAL.name]
    return {"data": name, "precision": "float32", "share_of_an_epoch": row["scoring_over_training"]}


def _warm_table(warm: dict[str, Any]) -> Table:
    grid = Table(title=f"{warm['pairs']:,} pairs whose records are cached, in {warm['files']} files")
    for heading in ("", "seconds to step 1", "peak MB above the weights", "above few pairs"):
        grid.add_column(heading, justify="right" if heading else "left")
    for name, each in warm["starts"].items():
        above, few = each["peak_bytes"] - warm["model_bytes"], warm["few_pairs"]["peak_bytes"]
        grid.add_row(
            name, f"{each['seconds']:.1f}", f"{above / 1e6:.0f}", f"{(each['peak_bytes'] - few) / 1e6:.0f}"
        )
    return grid


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--files", type=int, default=300, help="files that the records lie in")
    parser.add_argument("--steps", type=int, default=2, help="measured optimizer steps of cold scoring")
    parser.add_argument("--output", type=Path, help="bench/results/cache.json unless --quick")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few pairs, into bench/.cache")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.shape = "tiny" if options.quick else "42M"
    if options.quick:
        options.pairs, options.files = 500, 5
    folder = HERE / ".cache" / "cache.json" if options.quick else HERE / "results" / "cache.json"
    options.output = options.output or folder
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
