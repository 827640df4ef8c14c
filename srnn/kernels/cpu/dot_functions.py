"""The compiled products, by form, type of values and number of streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from srnn.kernels.cpu.element_products import DenseProduct, GatherProduct, WindowProduct
from srnn.kernels.cpu.vector_code import ARGUMENTS, STORED
from srnn.kernels.cpu.vector_products import RowProduct

_FORMS = ("rows", "windows", "gathers", "dense")
_LAID_OUT = {"windows": WindowProduct, "gathers": GatherProduct, "dense": DenseProduct}
_KINDS = tuple(STORED)


@intrinsic(prefer_literal=True)
def _emit_dot(typing, form, lanes, kind, wide, tile, matrix, begin, end, x, streams, careful, out):
    """The code of a product in place."""
    signature = types.void(form, lanes, kind, wide, tile, *[types.int64] * len(ARGUMENTS))
    name, values = _FORMS[form.literal_value], _KINDS[kind.literal_value]
    options = (values, bool(wide.literal_value), tile.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if name == "rows":
            RowProduct(builder, lanes.literal_value, *options, arguments[5:]).emit()
        else:
            _LAID_OUT[name](builder, *options, arguments[5:]).emit()
        return context.get_dummy_value()

    return signature, codegen


def dot_source(form: str, lanes: int, values: str, wide: bool, tile: int) -> Callable[..., None]:
    """The product as what numba compiles.

    Args:
        form: ``rows``, ``windows``, ``gathers`` or ``dense``.
        lanes: N of the blocks.
        values: what is stored: fp32, fp16, bf16 or int8.
        wide: whether columns take 32 bits.
        tile: streams a time.
    """
    which, kind, width = _FORMS.index(form), _KINDS.index(values), int(wide)

    def dot(matrix, begin, end, x, streams, careful, out):
        _emit_dot(which, lanes, kind, width, tile, matrix, begin, end, x, streams, careful, out)

    return dot
