"""SSVD inside other frameworks: one module each, imported on demand."""
