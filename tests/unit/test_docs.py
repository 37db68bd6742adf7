"""What the documentation says is true: its commands and snippets run, its files exist, its output is ours."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from doc_blocks import DOCS, ROOT, Block, blocks, commands, localised, make_workspace
from fiducial import cli
from fiducial.config.load import load_run, validate_config
from fiducial.config.methods import METHODS
from fiducial.config.methods.dpo import MODIFIERS
from fiducial.reference.describe import plan_run
from fiducial.reference.memory import LARGEST_BUDGET

EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
LANGUAGES = {"bash", "yaml", "python", "text"}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint and local pairs, which planning only reads."""
    folder = tmp_path_factory.mktemp("planned")
    make_workspace(folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `run.yaml` is the README's, on a tiny checkpoint and local pairs."""
    make_workspace(tmp_path)
    (readme_run,) = [block for block in blocks("yaml") if block.file == "README.md"]
    run = localised(yaml.safe_load(readme_run.text))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_example_is_loaded_without_notes(example: Path) -> None:
    loaded = load_run(example)

    assert loaded.notes == ()
    assert loaded.config.method is not None
    assert example.read_text(encoding="utf-8").startswith("# "), "say in a comment what it shows"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_example_is_planned(example: Path, planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(planned)
    settings = yaml.safe_load(example.read_text(encoding="utf-8"))

    report = plan_run(validate_config(localised(settings)))

    expected = EXPECTED_SOURCE[str(example.relative_to(ROOT / "examples"))]
    assert report["reference"]["source"] == expected
    assert report["data"]["rows"] == 8


EXPECTED_SOURCE = {
    "adapter-reference.yaml": "frozen_adapter",
    "gemma-2-simpo.yaml": "none",
    "hh-transcripts.yaml": "initial_policy",
    "llama-3-8b-dpo-lora.yaml": "adapter_off",
    "llama-3-8b-dpo-qlora.yaml": "adapter_off",
    "mistral-orpo.yaml": "none",
    "other-reference.yaml": "separate_model",
    "quickstart/dpo.yaml": "initial_policy",
    "quickstart/lora.yaml": "adapter_off",
    "qwen-dpo-full.yaml": "initial_policy",
    "resumed-adapter.yaml": "frozen_adapter",
    "served-reference.yaml": "endpoint",
}
REFERENCE_FREE = {"alphapo", "cpo", "cpo_hinge", "cpo_ipo", "orpo", "sft", "simpo", "tpo", "tpo_l"}
LIVE = {"tdpo1", "tdpo2"}
EXPECTED_SOURCE |= {
    f"methods/{path.name}": "none"
    if path.stem in REFERENCE_FREE
    else "separate_model"
    if path.stem in LIVE
    else "initial_policy"
    for path in (ROOT / "examples" / "methods").glob("*.yaml")
}


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_block_is_of_a_kind_that_a_test_runs(block: Block) -> None:
    assert block.language in LANGUAGES


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_run_or_part_of_one(block: Block, workspace: Path) -> None:
    settings: Any = yaml.safe_load(block.text)
    if isinstance(settings, list):
        settings = {"datasets": settings}
    whole = {"base_model": "base", "rl": "dpo", "datasets": [{"path": "pairs.jsonl"}]} | settings

    validate_config(whole)
    report = plan_run(validate_config(localised(whole)))

    assert report["method"]["name"] == whole["rl"]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "command"), commands())
def test_command_runs(where: str, command: str, workspace: Path) -> None:
    program, *arguments = shlex.split(command)
    RUNNERS[program](arguments)


def run_fiducial(arguments: list[str]) -> None:
    if arguments[0] in ("evaluate", "merge", "verify"):
        train = ["train", "run.yaml", "save_steps=2", "val_set_size=2"]
        CliRunner().invoke(cli.app, train, catch_exceptions=False)
    places = {"outputs/run": "out", "outputs/run/checkpoint-2": "out/checkpoint-2"}
    places["datasets.0.path=new.jsonl"] = "datasets.0.path=pairs.jsonl"
    arguments = [places.get(argument, argument) for argument in arguments]

    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)

    assert result.exit_code == 0, result.stderr


def run_make(arguments: list[str]) -> None:
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


def run_pip(arguments: list[str]) -> None:
    """Installing is not for a test; what would be installed must exist."""
    assert arguments[0] == "install"
    for extra in re.findall(r"\[(\w+)\]", " ".join(arguments)):
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def run_python(arguments: list[str]) -> None:
    assert (ROOT / arguments[0]).is_file()


RUNNERS = {"fiducial": run_fiducial, "make": run_make, "pip": run_pip, "python": run_python}


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [block for block in blocks("python") if block.file != "CONTRIBUTING.md"], ids=str
)
def test_python_runs(block: Block, workspace: Path) -> None:
    exec(compile(block.text, str(block), "exec"), {"__name__": "snippet"})


def test_the_readmes_plan_and_tree_are_what_they_are_made_from() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "readme.py"))["render"](README)

    assert made.splitlines() == README.splitlines(), "run: make docs"


def test_the_page_of_losses_and_its_plots_are_what_they_are_made_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "losses.py"))

    assert (ROOT / "docs" / "losses.md").read_text(encoding="utf-8") == made["page"](), "run: make docs"
    for path, plot in made["plots"]().items():
        assert path.read_text(encoding="utf-8") == plot, "run: make docs"


def test_the_largest_passes_are_those_of_the_code() -> None:
    text = " ".join((ROOT / "docs" / "reference.md").read_text(encoding="utf-8").split())

    assert f"{LARGEST_BUDGET['gpu']:,} tokens on a GPU and {LARGEST_BUDGET['cpu']:,} on a CPU" in text


def test_every_loss_is_explained() -> None:
    notes = yaml.safe_load((ROOT / "docs" / "losses" / "notes.yaml").read_text(encoding="utf-8"))["losses"]
    for method in METHODS:
        note = notes[method.model_fields["name"].default]
        settings = set(method.model_fields) - {"name", *MODIFIERS}
        assert note["formula"]
        assert note["when"]
        assert bool(note.get("defaults")) == bool(settings), method


def test_the_readmes_tree_has_a_line_for_every_file() -> None:
    files = [path.name for path in (ROOT / "src" / "fiducial").rglob("*.py") if path.name != "__init__.py"]

    assert sorted(re.findall(r"^ +(\w+\.py) +\S", README, re.MULTILINE)) == sorted(files)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    paths = re.findall(r"`((?:src|tests|docs|examples|bench)/[\w./-]+)`", text)

    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in paths if not (ROOT / name).exists()]

    assert missing == []


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_documents_are_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.slow
def test_the_recipe_for_a_loss_works(tmp_path: Path) -> None:
    for folder in ("docs", "src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    recipe = {
        block.text.splitlines()[0].removeprefix("# "): block.text
        for block in blocks("python", "text")
        if block.file == "CONTRIBUTING.md"
    }

    def add(file: str, before: str, text: str) -> None:
        path = tmp_path / file
        source = path.read_text(encoding="utf-8")
        assert source.count(before) == 1, (file, before)
        path.write_text(source.replace(before, text + before), encoding="utf-8")

    configs, formulas = "src/fiducial/config/methods/dpo.py", "src/fiducial/losses/dpo.py"
    family, methods = "src/fiducial/config/methods/dpo_family.py", "src/fiducial/config/methods/__init__.py"
    table, values = "src/fiducial/losses/__init__.py", "tests/unit/losses/test_values.py"
    add(configs, "\nclass HingeConfig(", recipe[configs] + "\n\n")
    add(formulas, "\ndef hinge_loss(", recipe[formulas] + "\n\n")
    for file, before in ((family, "    HingeConfig,\n"), (methods, "    HingeConfig,\n")):
        add(file, before, "    SquaredHingeConfig,\n")
    add(family, "    | HingeConfig\n", "    | SquaredHingeConfig\n")
    add(methods, '    "HingeConfig",\n', '    "SquaredHingeConfig",\n')
    add(table, "    methods.HingeConfig: ", recipe[table] + "    ")
    add(table, "    hinge_loss,\n", "    squared_hinge_loss,\n")
    add(values, "    (methods.HingeConfig(beta=0.2), 1 - 0.8, 0.2, -0.6),", recipe[values])

    tests = ["tests/unit/losses/test_values.py", "tests/unit/losses/test_table.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    assert "test_needs_its_reference_or_ignores_one[SquaredHingeConfig] PASSED" in done.stdout


def test_the_recipe_for_a_format_shows_our_code() -> None:
    file = "src/fiducial/data/formats/trl.py"
    block = next(block for block in blocks("python") if block.text.startswith(f"# {file}\n"))

    assert block.text.partition("\n")[2] in (ROOT / file).read_text(encoding="utf-8")
