"""Where the data of this package lies: beside the package in a checkout, inside it once installed from a wheel."""

import os
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def data_dir() -> Path:
    """The folder that holds the embedded models and tables.

    The first of: `$EDGELAB_DATA`, `data/` of the source checkout, `edgelab/_data` of an installed wheel.
    Raises FileNotFoundError if none is there, or if `$EDGELAB_DATA` names no folder.
    """
    chosen = os.environ.get("EDGELAB_DATA")
    if chosen:
        folder = Path(chosen).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"EDGELAB_DATA={chosen!r} is not a folder; unset it to use the data of the package")
        return folder.resolve()
    # a checkout is known by its pyproject.toml: site-packages may hold a stranger's folder called data
    checkout = _HERE.parent / "data"
    if checkout.is_dir() and (_HERE.parent / "pyproject.toml").is_file():
        return checkout
    inside = _HERE / "_data"
    if inside.is_dir():
        return inside
    raise FileNotFoundError(f"no data at {checkout} or {inside}; install from a whole wheel or set EDGELAB_DATA to a copy of data/")
