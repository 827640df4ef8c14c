"""The networks: plain ``nn.Module``s on torch's own recurrent layers."""

from srnn.models.recurrent import LanguageModel, gru, lstm, rnn

__all__ = ["LanguageModel", "gru", "lstm", "rnn"]
