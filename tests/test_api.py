import subprocess
import sys

import srnn


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


def test_loading_a_model_needs_no_training_stack():
    code = (
        "import sys, srnn; srnn.load; srnn.export; import srnn.kernels, srnn.sparse\n"
        "heavy = {'pytorch_lightning', 'hydra', 'omegaconf', 'wandb', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
