"""Now ``srnn.inference.sparsify`` and ``srnn.inference.calibration``."""

from srnn.deploy import moved

__getattr__ = moved(
    "srnn.deploy.sparsify",
    {
        "desparsify": "srnn.inference.sparsify",
        "record_inputs": "srnn.inference.calibration",
        "sparsify": "srnn.inference.sparsify",
    },
)
