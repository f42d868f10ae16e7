"""Writing of files that are never left half-written, and reading of .npz without executing code."""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mdsens._util.errors import InputError, short

__all__ = ["read_npz", "replacing"]

# what numpy, zipfile and zlib raise for damaged files, beside ValueError
DAMAGE = (
    OSError,
    EOFError,
    KeyError,
    AttributeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under the name ``path`` only when it is complete.

    An existing file of this name is replaced. The existing file stays unchanged if writing fails or
    is interrupted.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file.")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder: make the folder, or correct the path.")
    # beside it, because os.replace is atomic only within one file system; the number of the process
    # keeps two writers apart
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on disk before the name is, in case the machine stops
        os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): choose another path."
        ) from error
    finally:
        # after os.replace there is no such file; a failed or interrupted write leaves one
        part.unlink(missing_ok=True)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Read all arrays of a .npz file, by name.

    Raises:
      InputError: the file does not exist, is damaged or is not a .npz, or contains Python objects,
        which are not read because reading Python objects can execute code.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"`path` is {short(path)}: give the path of a .npz file.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    # before DAMAGE, which contains OSError, the base class of this error
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: correct the path.") from error
    except ValueError as error:
        with open(path, "rb") as file:
            archive = file.read(2) == b"PK"  # a .npz is a zip archive, which begins so
        # numpy takes a file that is no archive for a pickle: its message alone does not tell
        if archive and "pickle" in str(error):
            raise InputError(
                f"{path} holds Python objects, which are not read: store arrays of numbers."
            ) from error
        reason = str(error) if archive else "it does not begin like one"
        raise InputError(
            f"{path} is no whole .npz file ({reason}): write or download the file again."
        ) from error
    except DAMAGE as error:
        raise InputError(
            f"{path} is no whole .npz file ({error}): write or download the file again."
        ) from error
