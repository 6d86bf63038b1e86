"""convert: converts checkpoints of ESPnet's own SSVD adapter to adapters of this package, and back."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ..integrations.espnet_checkpoints import from_espnet, to_espnet
from . import UsageError


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ssvd_kernels").setLevel(logging.INFO)  # what ESPnet's configuration has to say is logged
    if args.direction == "from-espnet":
        _check_new(args.adapter, args.base_out)
        options = {"rotation_map": args.rotation_map, "base": args.base, "base_path": args.base_out}
        print(from_espnet(args.checkpoint, args.adapter, **options))
        written = [args.adapter, args.base_out]
    else:
        _check_new(args.checkpoint)
        progress = sys.stderr.isatty()
        to_espnet(args.adapter, args.base, args.checkpoint, merged=not args.unmerged, progress=progress)
        written = [args.checkpoint]
    print(f"wrote {' and '.join(str(path) for path in written if path is not None)}")
    return 0


def _check_new(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and path.exists():
            raise UsageError(f"{path} already exists: choose the name of a new file")
