"""The networks: plain ``nn.Module``s on torch's own recurrent layers."""

from srnn.models.recurrent import LanguageModel, SequenceModel, gru, lstm, recurrent, rnn

__all__ = ["LanguageModel", "SequenceModel", "gru", "lstm", "recurrent", "rnn"]
