"""Now ``srnn.inference.packing``, ``unpacking``, ``packed_file`` and ``weights``.

``PackedModel.from_model``, ``build`` and ``build_sparse`` are ``pack`` and ``unpack`` there.
"""

from srnn.deploy import moved

__getattr__ = moved(
    "srnn.deploy.packed",
    {
        "PackedModel": "srnn.inference.packing",
        "load": "srnn.inference.packed_file",
        "read": "srnn.inference.packed_file",
        "read_weights": "srnn.inference.weights",
        "write": "srnn.inference.packed_file",
    },
)
