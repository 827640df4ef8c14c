"""Configs: typed settings, composing them by Hydra, the command line, and sweeps."""
