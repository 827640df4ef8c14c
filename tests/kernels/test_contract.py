"""What plug-ins derive from: the examples in its docstrings run."""

import doctest

from srnn.kernels import contract


def test_the_example_of_a_kernel_runs():
    assert doctest.testmod(contract).attempted > 0
    assert doctest.testmod(contract).failed == 0
