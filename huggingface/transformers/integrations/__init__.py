"""Kernels and attention functions, each beside its plain-PyTorch reference."""
