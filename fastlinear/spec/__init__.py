"""What the numbers mean, in plain torch: activations, formats, int8, schemes; no kernels."""
