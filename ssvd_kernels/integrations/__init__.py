"""SSVD in other frameworks: one module each, imported on demand."""
