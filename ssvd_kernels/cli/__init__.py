"""The commands of `python -m ssvd_kernels`, a module each with `run(args) -> exit code`. Imported when called for."""


class UsageError(Exception):
    """A command that cannot be run as it was given."""
