import gc
import subprocess
import sys

import pytest

import srnn
from srnn.importing import nothing_collected


def test_public_names():
    assert srnn.__all__ == [
        "Pruner",
        "PruningCallback",
        "UserError",
        "__version__",
        "desparsify",
        "export",
        "load",
        "prune",
        "register",
        "save",
        "sparsify",
    ]
    assert all(getattr(srnn, name) for name in srnn.__all__)
    assert dir(srnn) == srnn.__all__


def test_the_collector_is_left_as_it_was():
    with pytest.raises(AttributeError), nothing_collected():
        srnn.no_such_name  # noqa: B018
    assert gc.isenabled()
    with nothing_collected():
        assert not gc.isenabled()
    gc.disable()
    try:
        assert srnn.load
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_loading_a_model_needs_no_training_stack():
    code = (
        "import sys, srnn; srnn.load; srnn.export; import srnn.kernels, srnn.sparse\n"
        "heavy = {'pytorch_lightning', 'hydra', 'omegaconf', 'wandb', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
