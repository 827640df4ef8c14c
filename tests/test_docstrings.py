"""The examples in docstrings run, and what users call and plug-ins derive from is explained."""

import doctest
import importlib
import inspect
import pydoc
import re
from pathlib import Path

import pytest

import srnn
from srnn.datasets import DataModule, LabelledSequences, TextStreams
from srnn.datasets.corpora import Corpus
from srnn.models import LanguageModel, SequenceModel
from srnn.pruning import PruningMethod, Shared, Structured
from srnn.registry import KINDS, Range, register

SOURCE = Path(srnn.__file__).parent
WITH_EXAMPLES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if ">>> " in path.read_text())
PUBLIC = {name: getattr(srnn, name) for name in srnn.__all__ if name not in ("__version__", "UserError")}
PUBLIC["register"] = type(srnn.register)
BASES = [PruningMethod, Structured, Shared, DataModule, TextStreams, LabelledSequences, Corpus, LanguageModel,
         SequenceModel, Range]  # fmt: skip
MISSING_EXAMPLES: list[str] = []
EXPLAINED = {n: t for n, t in (PUBLIC | {base.__name__: base for base in BASES}).items() if n not in MISSING_EXAMPLES}


def module_of(path):
    parts = ["srnn", *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture
def registry():
    """What examples register is gone after the test."""
    assert all(register.names(kind) for kind in KINDS)
    before = dict(register.components)
    yield
    register.components = before


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=str)
def test_examples_run(path, registry, monkeypatch, tmp_path):
    try:
        module = importlib.import_module(module_of(path))
    except ModuleNotFoundError as error:
        if str(error.name).startswith("srnn"):
            raise
        pytest.skip(f"needs {error.name}, which is not installed")
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner()
    said = []
    for examples in doctest.DocTestFinder().find(module):
        runner.run(examples, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert runner.tries > 0
    assert not list(tmp_path.iterdir()), "examples leave no files"


def documented(thing):
    """The docstring of a function; of a class also those of the bases whose arguments it takes."""
    classes = thing.__mro__ if inspect.isclass(thing) else [thing]
    return "\n".join(inspect.cleandoc(c.__doc__ or "") for c in classes if c.__module__.startswith("srnn."))


@pytest.mark.parametrize("name", EXPLAINED)
def test_what_users_meet_is_explained(name):
    thing = EXPLAINED[name]
    assert thing.__doc__
    docs = documented(thing)
    arguments = [p for p in inspect.signature(thing).parameters if not p.startswith("_")]
    if arguments:
        assert re.search("^(Args|Attributes):", docs, re.MULTILINE)
    missing = [a for a in arguments if not re.search(rf"^    ([\w, ]+, )?{a}(, [\w, ]+)?: ", docs, re.MULTILINE)]
    assert not missing, f"{name} does not say what {missing} are"
    assert "Raises:" in pydoc.render_doc(thing), "in its own docstring or in those of its methods"
    assert "Example:\n    >>> " in inspect.cleandoc(thing.__doc__)


def test_help_shows_what_arguments_mean():
    for thing in (srnn.Pruner, srnn.PruningCallback):
        assert "Initialize self" not in pydoc.render_doc(thing), "that of object says nothing"
