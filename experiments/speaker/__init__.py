"""Speaker verification after SpectralFT's paper (arXiv 2501.03829), small: `python -m experiments.speaker.run`."""
