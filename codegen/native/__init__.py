"""Kernels in C++ as shared libraries: what all of them share. The headers are for their sources, `library.py` makes and loads them."""
