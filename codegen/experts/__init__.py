"""`gw.token_choice_moe` and `gw.grouped_mm` on CPUs, from products of matrices of the library."""
