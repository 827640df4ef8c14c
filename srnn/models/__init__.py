"""The networks: plain ``nn.Module``s, most on torch's own recurrent layers."""

from srnn.models.deepspeech2 import DeepSpeech2, deepspeech2, deepspeech2_gru, deepspeech2_rnn, deepspeech2_small
from srnn.models.recurrent import LanguageModel, SequenceModel, gru, lstm, recurrent, rnn
from srnn.models.recurring import Recurring, recur
from srnn.models.transcribing import Transcriber

__all__ = [
    "DeepSpeech2",
    "LanguageModel",
    "Recurring",
    "SequenceModel",
    "Transcriber",
    "deepspeech2",
    "deepspeech2_gru",
    "deepspeech2_rnn",
    "deepspeech2_small",
    "gru",
    "lstm",
    "recur",
    "recurrent",
    "rnn",
]
