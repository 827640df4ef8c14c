"""One page for a browser: a network as WebAssembly, compiled of its C."""
