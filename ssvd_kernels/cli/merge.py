"""merge: writes a base model with its adapter as a transformers folder, a LoRA adapter, or a CTranslate2 folder."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from ..adapters.export import check_new, export_merged, new_folder, to_lora
from ..adapters.file_format import read_adapter
from ..adapters.save_load import load_adapter
from . import UsageError
from .base import load_base

FASTER_WHISPER = ("tokenizer.json", "preprocessor_config.json")  # what it reads beside CTranslate2's own files


def run(args: argparse.Namespace) -> int:
    if args.rank is not None and (not args.lora or args.rank < 1):
        raise UsageError(f"--rank must be an integer >= 1, together with --lora, got {args.rank}")
    if args.quantization is not None and not args.ctranslate2:
        raise UsageError(f"--quantization requires --ctranslate2, got --quantization {args.quantization}")
    check_new(args.output)
    file = read_adapter(args.adapter)  # a damaged file is found before the work
    model = load_base(args.base, args.float32, given=file.tensors)
    progress = sys.stderr.isatty()
    load_adapter(model, args.adapter, progress=progress)
    if args.lora:
        print(to_lora(model, args.output, args.rank, str(args.base), progress=progress))
    elif args.ctranslate2:
        with tempfile.TemporaryDirectory(dir=args.output.absolute().parent) as name:
            export_merged(model, Path(name, "merged"), files_from=args.base)
            to_ctranslate2(Path(name, "merged"), args.output, args.quantization)
    else:
        export_merged(model, args.output, files_from=args.base)
    print(f"wrote {args.output}")
    return 0


def write_missing(folder: Path, mels: int) -> None:
    """Writes those of FASTER_WHISPER that the folder lacks, from what transformers loads there.

    Without a feature extractor's file faster-whisper would take 80 mels for granted. Raises UsageError if there is no
    tokenizer at all.
    """
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    if not (folder / FASTER_WHISPER[0]).is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)  # an empty one where there are no files
        if "<|startoftranscript|>" not in tokenizer.get_vocab():
            raise UsageError("--ctranslate2 requires Whisper's tokenizer in the folder of the base model")
        tokenizer.save_pretrained(folder)
    if not (folder / FASTER_WHISPER[1]).is_file():
        try:
            extractor = WhisperFeatureExtractor.from_pretrained(folder)
        except OSError:
            extractor = WhisperFeatureExtractor(feature_size=mels)
        extractor.save_pretrained(folder)


def to_ctranslate2(folder: Path, output: Path, quantization: str | None) -> None:
    """Converts a transformers folder, with the files that faster-whisper wants."""
    try:
        from ctranslate2.converters import TransformersConverter
        from transformers import AutoConfig
    except ImportError as error:
        raise UsageError(f"--ctranslate2 requires ctranslate2 ({error}): pip install ctranslate2") from None
    if (config := AutoConfig.from_pretrained(folder)).model_type == "whisper":
        write_missing(folder, config.num_mel_bins)
    files = [name for name in FASTER_WHISPER if (folder / name).is_file()]
    converter = TransformersConverter(str(folder), copy_files=files)
    with new_folder(output) as temporary:
        converter.convert(str(temporary), quantization=quantization, force=True)
