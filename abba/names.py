"""Names that a file says of another: what was downloaded or damaged must not lead out of its directory."""

import re
from pathlib import Path
from typing import Any

from abba.errors import AbbaError, CheckpointError

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # names that Windows keeps


def safe_name(name: Any, source: str, error: type[AbbaError] = CheckpointError) -> str:
    """`name`, which was read in `source`, if it is that of a file beside it: letters, digits, `.`, `_`, `-`; no path.

    Raises:
        error: it is anything else.
    """
    plain = isinstance(name, str) and _SAFE_NAME.fullmatch(name) and ".." not in name and not name.endswith(".")
    if not plain or _DEVICE.fullmatch(name):
        raise error(f"{source}: {str(name)[:100]!r} is not the plain name of a file beside it")
    return name


def inside(root: Path, path: Path) -> Path:
    """`path` with every link followed, if that is below `root`.

    A snapshot of the Hub cache is made of links into the `blobs` of its repository; these count as inside it.

    Raises:
        CheckpointError: it leads elsewhere.
    """
    try:
        home, target = root.resolve(), path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        raise CheckpointError(f"{root}: {str(path)[-100:]!r} is no path that can be followed") from error
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(allowed in target.parents for allowed in homes):
        raise CheckpointError(f"{path}: leads out of {root}, to {target}; put the file itself there")
    return target
