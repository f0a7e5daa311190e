"""Calls of kernels, a library's or ours, that stand in a graph for one or more of its calls."""

from torch import Tensor


class LibraryCall:
    """A callable that is the target of a node, on operands of its own."""

    def scratch(self, x: Tensor, result: Tensor) -> int:
        """Bytes that a call needs beside operands and result at most, from the types of its first operand and its result."""
        raise NotImplementedError
