"""Products of rows with weights that were laid out once for a kernel of ours."""
