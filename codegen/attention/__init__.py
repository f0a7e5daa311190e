"""`gw.kv_append` and `gw.cached_attention` on CPUs: a kernel in C++ (`native/`), compiled on the machine that it runs on, how it is
called, and which calls of a graph it runs."""
