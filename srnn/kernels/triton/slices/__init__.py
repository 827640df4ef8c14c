"""Slices of 8 to 32 streams on tensor cores, each row of h waited for by itself."""
