"""Where a run may be put. Loads no torch, so that a wrong place is told at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tsugiki.errors import RunError
from tsugiki.files import as_disk_error


def refuse_used(folder: Path) -> None:
    """Refuse an output folder that a run could not be put in, before anything is read for it.

    Raises:
        RunError: a file, or a folder that holds something already.
        DiskError: it could not be made there.
    """
    try:
        if folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
            run = (folder / "config.yaml").is_file()
            raise RunError(
                f"the output folder {folder} exists already",
                fix=(f"--resume {folder} goes on with it; or " if run else "")
                + "choose another --output",
            )
        there = folder
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise RunError(f"{there} is a file, not a folder", fix="choose another --output")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise as_disk_error(error, folder) from None
