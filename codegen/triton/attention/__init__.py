"""`gw.kv_append` and `gw.cached_attention` on GPUs: kernels written by hand, as nothing of what surrounds them is fused into them.

Nothing here imports triton until a call is launched or compiled.
"""
