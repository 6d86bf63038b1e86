"""Constants that the kernels share with `ops/reference.py`, which computes the same."""

LATTICE = 49471, 37345  # noise of stochastic rounding: 2^16 over the plastic number and over its square
LARGE = 50.0  # ||column of K||^2 from which float32 is not tried; 30 to 45 in a random K of ||K||_2 = 10
NOT_UNIT = 2e-6  # | ||column of G||^2 - 1 | from which E may be off by 1e-5; about 1e-6 in such a K
