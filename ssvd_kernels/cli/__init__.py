"""The commands of `python -m ssvd_kernels`, one module each with `run(args) -> exit code`, imported on demand."""


class UsageError(Exception):
    """A command that cannot be run as it was given."""
