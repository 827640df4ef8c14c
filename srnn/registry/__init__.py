"""The registry: names -> components, whose signatures are their schemas."""

from srnn.registry.registry import KINDS, Registry, register
from srnn.registry.schema import Component, Option, Range, check_options, check_ranges, type_name

__all__ = [
    "KINDS",
    "Component",
    "Option",
    "Range",
    "Registry",
    "check_options",
    "check_ranges",
    "register",
    "type_name",
]
