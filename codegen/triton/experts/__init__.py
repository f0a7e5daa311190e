"""`gw.token_choice_moe`, `gw.expert_mlp` and `gw.grouped_mm` on GPUs: kernels written by hand. Nothing here imports triton until a call is
launched or compiled. `python -m graphwright.codegen.triton.experts` checks them, in Triton's interpreter where there is no GPU."""
