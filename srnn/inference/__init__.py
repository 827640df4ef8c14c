"""Networks on sparse kernels: sparse modules, packing, the packed file, latency."""
