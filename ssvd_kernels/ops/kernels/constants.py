"""Constants that the kernels share with `ops/reference.py`, which computes the same."""

LATTICE = 49471, 37345  # noise of stochastic rounding: 2^16 over the plastic number and over its square
LARGE = 50.0  # ||column of K||^2 from which float32 is not tried; 29 to 51 if K is random, k > 64, ||K||_2 = 10
NOT_UNIT = 1.5e-6  # | ||column of G||^2 - 1 | from which E is done again; at most 1.5e-6 in such a K
