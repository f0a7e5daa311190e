"""`gw.rat_attention` and `gw.rat_cached_attention` on GPUs: kernels written by hand. Nothing here imports triton until a call is launched
or compiled."""
