"""Kernels in C++ as shared libraries: what all of them share. `vectors.h` is for their sources, `library.py` makes and loads them."""
