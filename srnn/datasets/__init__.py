"""The data sets: a LightningDataModule each."""

from srnn.datasets.python_source import PythonSource
from srnn.datasets.text import Text, Texts, TextStreams

__all__ = ["PythonSource", "Text", "TextStreams", "Texts"]
