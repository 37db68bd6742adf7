"""Fixtures every test may use."""

import gc
import inspect
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import FunctionType

import jaxtyping
import pytest

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


_FOLDERS = count()


def pytest_collection_finish() -> None:
    """Leave to the garbage collector only what tests make.

    Every run collects twice, and what torch, transformers and TRL made when they were imported, half a
    million objects that stay, takes most of a second each time.
    """
    _check_shapes_where_they_are_stated()
    gc.collect()
    gc.freeze()


def _check_shapes_where_they_are_stated() -> None:
    """Leave out what else jaxtyping's import hook wraps: mypy knows those types; each call pays."""
    hook = jaxtyping.jaxtyped.__code__.co_filename
    for each in gc.get_objects():
        wrapped = type(each) is FunctionType and each.__code__.co_filename == hook
        if wrapped and hasattr(each, "__wrapped__") and "jaxtyping." not in str(inspect.signature(each)):
            each.__wrapped__.__no_type_check__ = True


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the reference cache of whoever runs it; fixtures of modules share one."""
    before = os.environ.get("FIDUCIAL_CACHE")
    os.environ["FIDUCIAL_CACHE"] = str(tmp_path_factory.getbasetemp() / "references")
    yield
    os.environ.pop("FIDUCIAL_CACHE")
    if before is not None:
        os.environ["FIDUCIAL_CACHE"] = before


@pytest.fixture(autouse=True)
def reference_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test's own default cache of reference log-probs, empty at its start."""
    folder = tmp_path_factory.getbasetemp() / f"references-{next(_FOLDERS)}"
    monkeypatch.setenv("FIDUCIAL_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real preference data beside the repository; tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real preference data is not at {SHARED_DATA}")
    return SHARED_DATA
