"""`python -m edgelab.peers list | install NAME ... [--root FOLDER]`."""

import argparse
from pathlib import Path

from edgelab.peers import PEERS, default_root, environments, install


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m edgelab.peers", description="Quantization tools to compare with, each in its own environment."
    )
    parser.add_argument("--root", type=Path, default=None, help="folder of the environments (default: $EDGELAB_PEERS or .peers)")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="which there are, and which are installed")
    adding = commands.add_parser("install", help="make the environment of one or more")
    adding.add_argument("names", nargs="+", choices=sorted(PEERS), metavar="NAME", help=", ".join(PEERS))
    for sub in (listing, adding):  # also after the command
        sub.add_argument("--root", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    root = chosen.root or default_root()
    if chosen.command == "list":
        installed = environments(root)
        for p in PEERS.values():
            where = f"installed: {installed[p.name]}" if p.name in installed else "not installed"
            print(f"{p.name:22}{p.requirements[0]:32}{', '.join(p.methods):42}{where}\n{'':22}{p.note}")
    for name in getattr(chosen, "names", ()):
        print(f"{name}: {install(name, root, quiet=False)}")


if __name__ == "__main__":
    main()
