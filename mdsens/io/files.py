"""Reading and replacing files."""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mdsens._util.errors import InputError

__all__ = ["read_npz", "replacing"]


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when all is written: no half-written file is ever found
    under it.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file.")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder: make it first, or correct the path.")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): choose another place."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of a .npz file; objects are refused, because reading one would execute code."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: correct the path.") from error
    except ValueError as error:
        with open(path, "rb") as file:
            archive = file.read(2) == b"PK"
        if archive and "pickle" in str(error):  # numpy takes what is no archive at all for a pickle
            raise InputError(
                f"{path} holds Python objects, which are not read: store plain arrays."
            ) from error
        reason = str(error) if archive else "it does not begin as one"
        raise InputError(
            f"{path} is no whole .npz file ({reason}): write or fetch it again."
        ) from error
    except (
        OSError,
        EOFError,
        KeyError,
        AttributeError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(
            f"{path} is no whole .npz file ({error}): write or fetch it again."
        ) from error
