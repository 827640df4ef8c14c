"""The data sets: a LightningDataModule each."""

from srnn.datasets.base import DataModule, LabelledSequences
from srnn.datasets.corpora import PennTreebank, Shakespeare, WikiText2
from srnn.datasets.python_source import PythonSource
from srnn.datasets.sequences import Adding, Digits
from srnn.datasets.text import Text, Texts, TextStreams

__all__ = [
    "Adding",
    "DataModule",
    "Digits",
    "LabelledSequences",
    "PennTreebank",
    "PythonSource",
    "Shakespeare",
    "Text",
    "TextStreams",
    "Texts",
    "WikiText2",
]
