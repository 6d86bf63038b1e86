"""The speech experiment: fine-tunes a Whisper model with SSVD on real speech. Run `python -m bench.asr.demo`."""


class DemoError(Exception):
    """Something the user can put right: the message says what was wrong and what to do."""
