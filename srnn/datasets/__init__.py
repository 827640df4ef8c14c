"""The data sets: without Lightning, which takes seconds to import."""

from srnn.datasets.base import DataModule, LabelledSequences
from srnn.datasets.corpora import PennTreebank, Shakespeare, WikiText2
from srnn.datasets.python_source import PythonSource
from srnn.datasets.sequences import Adding, Digits
from srnn.datasets.speech import SpeechData
from srnn.datasets.speech_corpora import LibriSpeech, Manifest, SpokenDigits
from srnn.datasets.synthetic_speech import SyntheticSpeech
from srnn.datasets.text import Text, Texts, TextStreams

__all__ = [
    "Adding",
    "DataModule",
    "Digits",
    "LabelledSequences",
    "LibriSpeech",
    "Manifest",
    "PennTreebank",
    "PythonSource",
    "Shakespeare",
    "SpeechData",
    "SpokenDigits",
    "SyntheticSpeech",
    "Text",
    "TextStreams",
    "Texts",
    "WikiText2",
]
