"""What ``vllm serve`` makes of a command line before it starts an engine."""

from __future__ import annotations

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser


def engine_args(parser: FlexibleArgumentParser, *arguments: str) -> AsyncEngineArgs:
    """The engine's arguments from those of ``vllm serve``; a wrong one ends in SystemExit, as it does for users."""
    args = parser.parse_args(["serve", *arguments])
    args.model = args.model_tag  # as ServeSubcommand.cmd does
    return AsyncEngineArgs.from_cli_args(args)
