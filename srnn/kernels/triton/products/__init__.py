"""Products of a sparse matrix with few rows or many."""
