"""What many runs say: tables, plots, and runs of W&B projects."""
