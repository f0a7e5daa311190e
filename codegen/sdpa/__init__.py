"""Attention of many queries by a kernel of ours."""
