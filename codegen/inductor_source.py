"""The C++ in what Inductor wrote for a graph: a file of Python in which each kernel stands as a text."""

import re

_KERNEL = re.compile(r"^(\w+) = async_compile\.cpp\w*\(.*?r?'''\n?(.*?)'''", re.DOTALL | re.MULTILINE)


def cpp_kernels(written: str) -> str:
    """The kernels, each under a line of comment that names it; "" where the graph calls kernels of libraries alone."""
    return "\n".join(f"// {name}\n{text.strip()}\n" for name, text in _KERNEL.findall(written))
