"""Weights in 8 and 4 bits: packing, and loading and saving through upstream's quantiser interface."""
