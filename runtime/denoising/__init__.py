"""Networks that fill masked tokens: which function of a program a row runs by how much of it is masked, and the loop that fills them."""
