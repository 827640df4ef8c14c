"""Lets docstrings say ``Example:`` in the singular: the reference then shows it as code, as it does ``Examples:``."""

import re

import griffe


class ExampleSections(griffe.Extension):
    """Reads ``Example:`` as the section that griffe calls ``Examples:``."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.name == "__init__":  # says no more than to see the class, whose text has its arguments
            obj.docstring = None
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
