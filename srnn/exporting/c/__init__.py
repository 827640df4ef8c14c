"""One C file: a network as C99 without malloc, libm or files, for small devices."""
