"""Import paths that documents named before go on working, and say where their names are now."""

import importlib

import pytest

import srnn

OLD = [
    ("srnn.deploy.sparsify", "sparsify", "srnn.inference.sparsify"),
    ("srnn.deploy.sparsify", "desparsify", "srnn.inference.sparsify"),
    ("srnn.deploy.sparsify", "record_inputs", "srnn.inference.calibration"),
    ("srnn.deploy.packed", "PackedModel", "srnn.inference.packing"),
    ("srnn.deploy.packed", "read", "srnn.inference.packed_file"),
    ("srnn.deploy.packed", "write", "srnn.inference.packed_file"),
    ("srnn.deploy.packed", "load", "srnn.inference.packed_file"),
    ("srnn.deploy.packed", "read_weights", "srnn.inference.weights"),
]


@pytest.mark.parametrize(("module", "name", "home"), OLD)
def test_an_old_path_warns_and_gives_the_same_thing(module, name, home):
    with pytest.warns(FutureWarning, match=f"{module}.{name} is now {home}.{name}"):
        old = getattr(importlib.import_module(module), name)
    assert old is getattr(importlib.import_module(home), name)


def test_a_name_that_never_was_there():
    with pytest.raises(ImportError, match=r"cannot import name .nothing. from"):
        from srnn.deploy.packed import nothing  # noqa: F401


def test_schedules_are_where_they_were():
    assert srnn.Pruner.__module__ == "srnn.pruning.pruner"
    assert importlib.import_module("srnn.pruning.schedules").RunLength
