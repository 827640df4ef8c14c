"""A network -> a file that runs without srnn. No Lightning, Hydra or W&B here."""
