"""Transcribes recordings with a Whisper model and, if given, an SSVD adapter.

python -m experiments.asr.transcribe --adapter RUN/adapter.safetensors a.wav b.wav
python -m experiments.asr.transcribe --adapter RUN/adapter.safetensors --manifest RUN/held-out.jsonl    (adds the WER)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers

import ssvd_kernels as sk
from experiments.asr import DemoError
from experiments.asr.fetch import MODEL, default_data, ensure
from experiments.asr.manifests import read_manifest
from experiments.asr.recognizer import load_recognizer
from experiments.asr.runfolder import check_writable, write_json
from experiments.asr.speech import Clip, Speech


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises DemoError for a device that this torch can't use."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DemoError(
            f"--device must be auto, cpu or, with a GPU, cuda, got {name}, which is not available here "
            f"({str(error).splitlines()[0]})"
        ) from error
    return device


def run(args: argparse.Namespace) -> None:
    clips = [Clip(name, "", Path(name)) for name in args.audio]
    if args.manifest:
        clips = read_manifest(args.manifest, silent=True)
    if not clips:
        raise DemoError("nothing to transcribe: give audio files or --manifest")
    if args.json:
        check_writable(args.json.parent)
    if args.model is None:
        ensure(args.data, (MODEL,))
    recognizer = load_recognizer(args.model, args.data, pick_device(args.device), args.language)
    speech = Speech(clips, "reading audio")
    recognizer.set_window(args.window)
    if args.adapter:
        sk.load_adapter(recognizer.model, args.adapter)
        if args.merge:
            sk.merge(recognizer.model)
    transcripts = recognizer.transcribe(speech, "transcribing", batch=args.batch)
    if args.json:
        write_json(args.json, {"transcripts": transcripts})
    else:
        for clip, transcript in zip(speech.clips, transcripts, strict=True):
            print(f"{clip.name}\t{transcript}")
    if args.manifest:
        score = recognizer.score(speech.texts, transcripts)
        print(f"WER {100 * score.wer:.1f} % ({score.errors} errors in {score.words} words)", file=sys.stderr)


def main() -> int:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(prog="python -m experiments.asr.transcribe", description="Transcribes recordings.")
    parser.add_argument("audio", nargs="*", help="audio files")
    parser.add_argument("--manifest", type=Path, help="as for the demo, instead of audio files")
    parser.add_argument("--adapter", type=Path, help="SSVD adapter (safetensors)")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the weights first")
    parser.add_argument("--model", help="Hugging Face name or folder (default: the built-in Whisper tiny.en)")
    parser.add_argument("--data", type=Path, default=default_data(), help="data folder (default: $SSVD_DATA or ./data)")
    parser.add_argument("--window", type=float, default=30, help="seconds that the encoder hears (default: 30)")
    parser.add_argument("--batch", type=int, default=16, help="clips at once (default: 16)")
    parser.add_argument("--language", default="en", help="language code (default: en)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--json", type=Path, help="write the transcripts to this file instead of printing them")
    try:
        run(parser.parse_args())
    except (DemoError, sk.AdapterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
