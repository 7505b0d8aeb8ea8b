#!/usr/bin/env python3
"""Executes an experiment notebook: scripts/notebook.py NOTEBOOK [-p NAME VALUE ...]

The executed copy, with its outputs, is artifacts/executed/<notebook>[-<last value>].ipynb. Where `MMQLORA_WARM` names a socket of
`scripts/engine.py`, a fork of it does the work, else this process."""
import json
import os
import socket
import sys


def ask(path:str, argv:list[str]) -> int:
    ours = {k: v for k, v in os.environ.items() if k.startswith("MMQLORA_")}           # the engine began before some of them were set
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [json.dumps([os.getcwd(), argv, ours]).encode()], [0, 1, 2])
        return (server.recv(1) or b"\1")[0]


def main() -> int:
    if warm := os.environ.get("MMQLORA_WARM"): return ask(warm, sys.argv[1:])
    from engine import execute
    return execute(*sys.argv[1:])


if __name__ == "__main__": sys.exit(main())
