"""Numba kernels: arrays and scalars in, arrays out. `reference.PAIRS` names the NumPy twin of each."""
