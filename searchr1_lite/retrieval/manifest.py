"""An index folder that knows what it belongs to: written whole or not at all, refused for another corpus or encoder."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from searchr1_lite.retrieval.corpus import corpus_checksum
from searchr1_lite.types import Passage

FORMAT = 1
MANIFEST = "manifest.json"


class IndexMismatchError(ValueError):
    """A saved index that is not of this corpus, encoder or kind, or is not whole; the message says which."""


def belongs_to(kind: str, passages: list[Passage], **more: Any) -> dict[str, Any]:
    """What an index of these passages must say of itself to be used with them."""
    return {
        "format": FORMAT,
        "kind": kind,
        "corpus_checksum": corpus_checksum(passages),
        "passages": len(passages),
    } | more


def save_index(folder: Path, manifest: dict[str, Any], libraries: list[str], write: Callable[[Path], None]) -> None:
    """Write an index and its manifest into a temporary folder beside `folder`, then put it in place by renaming."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(fresh)
        sizes = {file.name: file.stat().st_size for file in sorted(fresh.iterdir())}
        more = {"files": sizes, "versions": {library: version(library) for library in libraries}}
        (fresh / MANIFEST).write_text(json.dumps(manifest | more, indent=2) + "\n", encoding="utf-8")
        fresh.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner can read
        if folder.exists():
            _check_is_index(folder)
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old / "index")
            os.replace(fresh, folder)
            shutil.rmtree(old)
        else:
            os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_index(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a saved index, after checking it against `belongs_to(...)` and its files against their sizes.

    Raises IndexMismatchError that names the first difference.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise IndexMismatchError(f"no index in {folder}: {MANIFEST} is missing; build one and save it there")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IndexMismatchError(f"{file} is not JSON ({error}); delete the folder and build the index again") from None
    for key, value in expected.items():
        found = manifest.get(key) if isinstance(manifest, dict) else None
        if found != value:
            raise IndexMismatchError(
                f"the index in {folder} does not belong here: its {key} is {found!r}, but {value!r} is needed; "
                "delete the folder and build the index again, or name another folder"
            )
    for name, size in manifest.get("files", {}).items():
        path = Path(folder) / name
        if not path.is_file() or path.stat().st_size != size:
            state = f"{path.stat().st_size} bytes instead of {size}" if path.is_file() else "missing"
            raise IndexMismatchError(f"the index in {folder} is not whole: {name} is {state}; build it again")
    return manifest


def _check_is_index(folder: Path) -> None:
    """Saving replaces an older index, and never a folder of something else."""
    if any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} exists and is no index (it has no {MANIFEST}); name another folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
