"""`gw.rat_attention` and `gw.rat_cached_attention` on CPUs: a kernel in C++ (`native/`), compiled on the machine that it runs on, and how
it is called."""
