"""The objectives: what is learned, and the scores that tell how well. One Lightning module each."""

from srnn.objectives.base import Objective
from srnn.objectives.classification import Classification
from srnn.objectives.ctc import Ctc
from srnn.objectives.next_token import NextToken
from srnn.objectives.regression import Regression
from srnn.objectives.whole_sequence import WholeSequence

__all__ = ["Classification", "Ctc", "NextToken", "Objective", "Regression", "WholeSequence"]
