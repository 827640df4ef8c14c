"""Training: the Lightning modules, the optimisers, the run."""
