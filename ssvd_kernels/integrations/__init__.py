"""Other libraries' training scripts with SSVD. Each module here needs its library, and only that one."""
