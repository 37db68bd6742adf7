"""The rules of ARCHITECTURE.md that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fiducial

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "fiducial"

# Imports point one way, from a higher layer to a lower or the same one. The longest matching name counts.
LAYERS = {
    "fiducial": 0,
    "fiducial._version": 0,
    "fiducial.errors": 0,
    "fiducial.config": 1,
    "fiducial.hub": 2,
    "fiducial.loss_table": 2,
    "fiducial.reference": 2,
    "fiducial.run_record": 3,
    "fiducial.logps": 3,
    "fiducial.sending": 3,
    "fiducial.compat": 3,
    "fiducial.agreement": 3,
    "fiducial.processes": 3,
    "fiducial.data": 4,
    "fiducial.losses": 4,
    "fiducial.reference.describe": 5,
    "fiducial.reference.row_counts": 5,
    "fiducial.reference.list_lengths": 5,
    "fiducial.model": 5,
    "fiducial.reference.sources": 6,
    "fiducial.reference.cache": 6,
    "fiducial.reference.fingerprint": 6,
    "fiducial.reference.approximation": 6,
    "fiducial.reference.named_adapter": 6,
    "fiducial.reference.everywhere": 6,
    "fiducial.reference.served": 6,
    "fiducial.reference.moving": 6,
    "fiducial.reference.noise": 6,
    "fiducial.reference.log_ratio": 6,
    "fiducial.reference.cache.filesystems": 2,
    "fiducial.reference.cache.inventory": 2,
    "fiducial.reference.cache.known": 2,
    "fiducial.reference.cache.names": 2,
    "fiducial.reference.cache.places": 2,
    "fiducial.reference.checkpoint_weights": 6,
    "fiducial.reference.fill": 6,
    "fiducial.reference.kept": 6,
    "fiducial.reference.one_pass": 6,
    "fiducial.reference.predicted": 6,
    "fiducial.reference.spot_check": 6,
    "fiducial.reference.setup": 6,
    "fiducial.offline": 6,
    "fiducial.policy_base": 6,
    "fiducial.reference.verify": 6,
    "fiducial.training": 7,
    "fiducial.model_card": 8,
    "fiducial.loading": 8,
    "fiducial.scoring_ahead": 8,
    "fiducial.prepare": 8,
    "fiducial.record_keeping": 8,
    "fiducial.run_report": 8,
    "fiducial.moving_run": 8,
    "fiducial.assembly": 8,
    "fiducial.cache_report": 9,
    "fiducial.cli_arguments": 9,
    "fiducial.cache_command": 9,
    "fiducial.merge": 8,
    "fiducial.train": 9,
    "fiducial.evaluate": 9,
    "fiducial.finished": 8,
    "fiducial.verification": 9,
    "fiducial.as_then": 9,
    "fiducial.cli": 10,
    "fiducial.__main__": 11,
}
TORCH_FREE = (
    "fiducial",
    "fiducial.config.load",
    "fiducial.hub",
    "fiducial.reference.facts",
    "fiducial.reference.plan",
    "fiducial.reference.memory",
    "fiducial.reference.describe",
    "fiducial.loss_table",
    "fiducial.run_record",
    "fiducial.cli",
)
FORBIDDEN_NAMES = ("util", "helper", "manager", "mixin", "common", "base")
MOST_LINES = 350

MODULES = {
    ".".join(["fiducial", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
each_module = pytest.mark.parametrize("module", MODULES)


def layer(module: str) -> int:
    """The layer of `module`, by its longest prefix in the table."""
    parts = module.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next(LAYERS[name] for name in names if name in LAYERS)


def imports(path: Path, among: dict[str, Path] = MODULES) -> set[str]:
    """Modules of the package that the file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (submodules & set(among)) or {str(node.module)}
    return {name for name in found if name.split(".")[0] == "fiducial"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"fiducial"}))
def test_imports_point_one_way(module: str) -> None:
    wrong = {name for name in imports(MODULES[module]) if layer(name) > layer(module)}

    assert not wrong, f"{module} (layer {layer(module)}) imports {sorted(wrong)}"


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from fiducial.training import trainer\n", encoding="utf-8")

    (found,) = imports(wrong)

    assert layer(found) > layer("fiducial.losses.paired")


def test_every_new_part_has_its_own_layer() -> None:
    parts = {".".join(module.split(".")[:2]) for module in MODULES}

    assert parts <= set(LAYERS), f"name a layer for {sorted(parts - set(LAYERS))}"


def test_the_public_names_are_typed_as_what_they_are_at_run_time() -> None:
    imported = {
        alias.name: node.module
        for node in ast.walk(ast.parse(MODULES["fiducial"].read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module and node.module.startswith("fiducial.") and alias.name != "VERSION"
    }

    assert imported == fiducial._HOME
    assert set(fiducial.__all__) <= set(dir(fiducial)), "a notebook completes them"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_planning_imports_no_torch(module: str) -> None:
    program = (
        f"import sys, {module}; print(sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    )

    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert loaded.stdout.strip() == "[]"


@each_module
def test_module_is_small_and_says_what_it_is_for(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")

    assert len(text.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"
    assert not any(
        part in FORBIDDEN_NAMES or part.rstrip("s") in FORBIDDEN_NAMES for part in module.split(".")
    )


def test_third_party_internals_are_touched_in_one_place() -> None:
    private = {
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        if module != "fiducial.compat"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and "fiducial" not in node.module
        if any(part.startswith("_") and part != "__future__" for part in node.module.split("."))
        or any(alias.name.startswith("_") for alias in node.names)
    }

    assert not private


@each_module
def test_annotations_are_real(module: str) -> None:
    assert "__future__" not in MODULES[module].read_text(encoding="utf-8")
