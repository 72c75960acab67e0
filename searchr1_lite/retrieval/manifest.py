"""What an index folder says of itself, so that a damaged one, or one of another corpus or encoder, is refused."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from searchr1_lite.errors import UserError
from searchr1_lite.files import write_json

FORMAT = 2
MANIFEST = "manifest.json"
AGAIN = "delete the folder and build the index again, or name another folder"


class IndexMismatchError(UserError):
    """A saved index that is not of this corpus, encoder or kind, or is not whole; the message says which."""


def write_manifest(folder: Path, manifest: dict[str, Any], libraries: list[str]) -> None:
    """Add what every manifest has: format, versions of `libraries`, bytes and SHA-256 of each file in the folder."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    versions = {library: version(library) for library in libraries}
    manifest = {"format": FORMAT} | manifest | {"files": files, "versions": versions}
    write_json(folder / MANIFEST, manifest | {"manifest_sha256": _digest(manifest)})


def check_index(folder: Path, expected: dict[str, Any] | None = None, verify: bool = True) -> dict[str, Any]:
    """The manifest of a saved index, after checking it and its files.

    `expected` is what the manifest must say; of a dict (the encoder) what is expected, not more. Without `verify` the
    files' sizes are checked and not their SHA-256, which takes as long as reading them. Raises IndexMismatchError that
    names the first difference.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise IndexMismatchError(f"no index in {folder}: {MANIFEST} is missing; build one and save it there")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IndexMismatchError(f"{file} is not JSON ({error}); {AGAIN}") from None
    found = manifest if isinstance(manifest, dict) else {}
    for key, value in ({"format": FORMAT} | (expected or {})).items():
        for what, its, needed in _parts(key, found.get(key), value):
            if its != needed:
                raise IndexMismatchError(
                    f"the index in {folder} does not belong here: its {what} is {its!r}, but {needed!r} is needed; "
                    f"{AGAIN}"
                )
    stated = manifest.pop("manifest_sha256", None)
    if stated != _digest(manifest):
        raise IndexMismatchError(f"{file} was altered since it was written; {AGAIN}")
    for name, its in manifest["files"].items():
        path = Path(folder) / name
        size = path.stat().st_size if path.is_file() else None
        if size != its["bytes"] or (verify and _sha256(path) != its["sha256"]):
            state = "missing" if size is None else f"{size} bytes instead of {its['bytes']}"
            state = state if size != its["bytes"] else "altered: its sha256 is not the one of when it was written"
            raise IndexMismatchError(f"the index in {folder} is not whole: {name} is {state}; {AGAIN}")
    return manifest


def _parts(key: str, found: Any, expected: Any) -> list[tuple[str, Any, Any]]:
    if not isinstance(expected, dict):
        return [(key, found, expected)]
    found = found if isinstance(found, dict) else {}
    return [(f"{key} {part}", found.get(part), value) for part, value in expected.items()]


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
