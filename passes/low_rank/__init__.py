"""Low-rank outlier absorption."""
