"""average: writes the mean of adapters of one base model as an adapter."""

from __future__ import annotations

import argparse
import sys

from ..adapters.averaging import average_adapters, average_files
from ..adapters.save_load import load_adapter
from ..adapters.switching import add_adapter
from . import UsageError
from .base import load_base


def run(args: argparse.Namespace) -> int:
    if len(args.adapters) < 2 or len(args.adapters) != len(args.weights or args.adapters):
        raise UsageError(
            f"at least two adapters, and as many --weights if any, are required, got {len(args.adapters)} adapters and "
            f"{len(args.weights or ())} weights"
        )
    if (args.base is None) == (args.of == "updates"):
        raise UsageError(f"--of updates requires --base FOLDER, and --of rotations needs none, got --of {args.of}")
    if args.base is None:
        average_files(args.adapters, args.out, args.weights)
    else:
        model = load_base(args.base)
        load_adapter(model, args.adapters[0], progress=sys.stderr.isatty())
        names = ["default", *(f"adapter{i}" for i in range(1, len(args.adapters)))]
        for name, path in zip(names[1:], args.adapters[1:]):
            add_adapter(model, name, path)
        average_adapters(model, dict(zip(names, args.weights or [1.0] * len(names))), args.out, "updates")
    print(f"wrote {args.out}")
    return 0
