"""vimamba serve: a trained run behind HTTP, with a page to try it on."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from vimamba.cli.parsing import add_options, take
from vimamba.quiet import quiet_libraries
from vimamba.serve.options import ServeOptions
from vimamba.tasks.options import InferenceOptions


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, its model.safetensors or one of its checkpoints")
    parser.add_argument("--config", action="config")
    for group in (ServeOptions, InferenceOptions):
        add_options(parser, group)


def run(parser: ArgumentParser, options: Namespace) -> int:
    from vimamba.serve import server

    what, how = take(ServeOptions, options), take(InferenceOptions, options)
    quiet_libraries()

    def ready(address: str) -> None:
        print(f"{options.run} at {address} (Ctrl-C stops it)", flush=True)

    server.serve(options.run, what, how, ready)
    return 0
