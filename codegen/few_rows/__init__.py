"""Products of up to eight rows with a weight by a kernel in C++ that reads it once, where it lies."""
