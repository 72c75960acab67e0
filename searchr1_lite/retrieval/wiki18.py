"""wiki-18 from the model hub: 21,015,324 passages, and the flat e5 index over them that Search-R1 searches.

`python -m searchr1_lite.retrieval.wiki18 --out data/cache/wiki-18` fetches, verifies and unpacks what the original
fetches by scripts/download.py and unpacks by hand (its README); `--plan` only says what that takes. A download is
removed once it is unpacked or joined. What is finished is not fetched, hashed or joined again, and work that was cut
off goes on. The original's BM25 and HNSW indexes are left out. `subset.py` opens the index, checks that it is whole and
has a vector a passage, and cuts out a corpus that fits a laptop.
"""

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from tqdm import tqdm

from searchr1_lite.errors import UserError
from searchr1_lite.files import write_json

CORPUS, INDEX = "wiki-18.jsonl", "e5_Flat.index"
MADE_OF = {  # hub dataset and files, in order; the index is its parts joined (Search-R1 README, "cat part_*")
    CORPUS: ("PeterJinGo/wiki-18-corpus", ["wiki-18.jsonl.gz"]),
    INDEX: ("PeterJinGo/wiki-18-e5-index", ["part_aa", "part_ab"]),
}
FINISHED = "wiki-18.json"  # the bytes of each file that is done
SUMS = "SHA256SUMS"  # beside the files of a local source, as the program sha256sum writes it
UNPACKED = 3.5  # times the size of a gzip file of passages, with room to spare: it is 2.8 on 9,020 of them
BLOCK = 1 << 20  # bytes


class Wiki18Error(UserError):
    """Files that cannot be had, do not fit or are not what they should be; the message says what to do."""


@dataclass(frozen=True)
class Part:
    name: str
    repo: str
    size: int  # bytes, as stored
    sha256: str | None  # None: nobody says what it should be
    path: Path | None  # None: it is on the hub

    @property
    def unpacked(self) -> int:
        return int(self.size * UNPACKED) if self.name.endswith(".gz") else self.size


@contextmanager
def _asking_the_hub(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub client raises many kinds
        short = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise Wiki18Error(
            f"{what} could not be had from the hub ({short}). Run the command again with a connection, it goes on from "
            "where it was; or bring the files in a folder and name it with --source FOLDER"
        ) from error


def hub_parts(target: str) -> list[Part]:
    """The parts of CORPUS or INDEX, with the sizes and checksums that the hub states."""
    repo, names = MADE_OF[target]
    with _asking_the_hub(f"what {repo} holds"):
        files = {file.path: file for file in HfApi().get_paths_info(repo, names, repo_type="dataset")}
        return [Part(name, repo, files[name].size, files[name].lfs.sha256, None) for name in names]


def local_parts(target: str, source: Path) -> list[Part]:
    """The same from a folder that holds the files of both repositories; checksums from SUMS, where it names them."""
    repo, names = MADE_OF[target]
    if missing := [name for name in names if not (source / name).is_file()]:
        raise Wiki18Error(f"{source} has no {', '.join(missing)} for {target}; fetch it from the hub dataset {repo}")
    lines = (source / SUMS).read_text(encoding="utf-8").splitlines() if (source / SUMS).is_file() else []
    sums = {name.lstrip("*"): digest for digest, name in (line.split(maxsplit=1) for line in lines if line.strip())}
    return [Part(name, repo, (source / name).stat().st_size, sums.get(name), source / name) for name in names]


def print_plan(out: Path, wanted: dict[str, list[Part]]) -> None:
    """Say what is fetched, what it becomes and the disk it takes; raises Wiki18Error where it does not fit.

    What counts is the moment that holds most: what is made so far, and one download beside what it becomes.
    """
    kept = most = 0
    for target, parts in wanted.items():
        for part in parts:
            file = part.path or f"{part.repo}/{part.name}"
            check = "" if part.sha256 else f", unverified: {SUMS} does not name it"
            print(f"{file}: {_gb(part.size)} -> {target}, about {_gb(part.unpacked)}{check}")
            most = max(most, kept + part.unpacked + (0 if part.path else part.size))
            kept += part.unpacked
    begun = [path for path in (*out.glob("*.new"), *out.glob("downloads/**/*")) if path.is_file()]
    most = max(0, most - sum(path.stat().st_size for path in begun))
    free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.is_dir())).free
    print(f"{out}: needs about {_gb(most)} more while at work, {_gb(kept)} when done; {_gb(free)} are free")
    if most > free:
        raise Wiki18Error(f"it does not fit in {out}; free some space, name another --out, or try --no-index")


def make(target: str, parts: list[Part], out: Path) -> None:
    """CORPUS or INDEX in `out`, from its parts, each verified before it is unpacked or joined.

    Parts of the index that an earlier call joined are not read again. Raises Wiki18Error.
    """
    joined, end = out / f"{target}.new", 0
    there = joined.stat().st_size if target == INDEX and joined.is_file() else 0
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if there >= end + part.size:
            end += part.size
            continue
        with _asking_the_hub(part.name):
            path = part.path or Path(
                hf_hub_download(part.repo, part.name, repo_type="dataset", local_dir=out / "downloads")
            )
        try:
            verify(part, path)
            end = append(part, path, joined, end)
        except (Wiki18Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
            if not part.path:
                path.unlink()
            again = f"fetch {path} again, then run" if part.path else "it is removed; run"
            raise Wiki18Error(f"{part.name} is cut off or altered ({error}); {again} the command again") from None
        if not part.path:
            path.unlink()
    os.truncate(joined, end)
    os.replace(joined, out / target)
    write_json(out / FINISHED, finished(out) | {target: end})
    shutil.rmtree(out / "downloads", ignore_errors=True)  # the hub client's own notes


def verify(part: Part, path: Path) -> None:
    """Raises Wiki18Error if the file's sha256 is not the one stated."""
    digest = hashlib.sha256()
    with path.open("rb") as file, tqdm.wrapattr(file, "read", part.size, desc=f"verifying {part.name}") as watched:
        while block := watched.read(BLOCK):
            digest.update(block)
    if part.sha256 not in (None, digest.hexdigest()):
        raise Wiki18Error(
            f"{path.stat().st_size:,} bytes of {part.size:,}; sha256 {digest.hexdigest()}, not {part.sha256}"
        )


def append(part: Part, path: Path, joined: Path, start: int) -> int:
    """Put the part, unpacked, at byte `start` of `joined`, with nothing after it; returns where it ends."""
    with path.open("rb") as file, joined.open("ab") as to:
        to.truncate(start)
        with tqdm.wrapattr(file, "read", part.size, desc=f"{part.name} -> {joined.stem}") as watched:
            shutil.copyfileobj(gzip.GzipFile(fileobj=watched) if part.name.endswith(".gz") else watched, to, BLOCK)
        return to.tell()


def finished(out: Path) -> dict[str, int]:
    """The files in `out` that are whole and verified, with their bytes."""
    sizes = json.loads((out / FINISHED).read_text(encoding="utf-8")) if (out / FINISHED).is_file() else {}
    return {
        name: size for name, size in sizes.items() if (out / name).is_file() and (out / name).stat().st_size == size
    }


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
