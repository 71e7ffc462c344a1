"""Several neural networks on one GPU."""
