"""plan: the ranks that a budget of trainable parameters allows for a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Collection

from ..config import PRESETS
from ..model.planner import RankPlan, plan
from . import UsageError
from .base import load_base


def run(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in ("side", "rotation", "inner_share", "top")}
    model = load_base(args.base)
    try:
        found = plan(
            model,
            budget=_number(args.budget),
            method=args.method,
            allocation=args.allocation,
            targets=_names(args.targets, ("all-linear", *PRESETS)),
            exclude=_names(args.exclude),
            progress=sys.stderr.isatty(),
            **{name: value for name, value in given.items() if value is not None},
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    print(as_json(found) if args.json else found)
    return 0


def as_json(found: RankPlan) -> str:
    """Every field of the plan and of its layers, and `trainable`."""
    layers = [layer._asdict() for layer in found.layers]
    return json.dumps({**dataclasses.asdict(found), "trainable": found.trainable, "layers": layers}, indent=1)


def _number(text: str) -> float:
    try:
        number = float(text)
        return int(number) if number.is_integer() else number
    except (ValueError, OverflowError):
        raise UsageError(f"--budget must be an integer, or a share such as 0.02, got {text}") from None


def _names(given: list[str], presets: Collection[str] = ()) -> str | list[str]:
    """A single preset, or an expression (no plain word), as a string; else the list of suffixes."""
    alone = len(given) == 1 and (given[0] in presets or not re.fullmatch(r"[\w.-]+", given[0]))
    return given[0] if alone else given
