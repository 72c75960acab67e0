"""wiki-18 from the model hub: 21,015,324 passages, and the flat e5 index over them that Search-R1 searches.

`searchr1 index wiki18` fetches, verifies and unpacks what the original fetches by scripts/download.py and unpacks by
hand (its README); `--plan` only says what that takes. A download is removed once it is unpacked or joined; what is
finished is not fetched again, and a download that was cut off resumes. The original's BM25 and HNSW indexes are left
out. `subset.py` cuts out a corpus that fits a laptop.
"""

import gzip
import hashlib
import json
import os
import shutil
import zlib
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
UNPACKED = 3.5  # times the size of a gzip file of passages, with room to spare: it is 2.8 on 9,020 of them
BLOCK = 1 << 20  # bytes


class Wiki18Error(UserError):
    """Files that cannot be had, do not fit or are not what they should be; the message says what to do."""


@dataclass(frozen=True)
class Part:
    name: str
    repo: str
    size: int  # bytes, as stored
    sha256: str

    @property
    def unpacked(self) -> int:
        return int(self.size * UNPACKED) if self.name.endswith(".gz") else self.size


def fetch(out: Path, with_index: bool = True, plan: bool = False) -> None:
    """Make CORPUS and INDEX in `out`, or with `plan` say what that takes; raises Wiki18Error."""
    targets = [name for name in MADE_OF if name not in finished(out) and (with_index or name == CORPUS)]
    parts = {name: hub_parts(name) for name in targets}
    if parts:
        print_plan(out, parts)
    for target in () if plan else targets:
        make(target, parts[target], out)
    print(*(f"{out / name}: whole, {size:,} bytes" for name, size in finished(out).items()), sep="\n")


def hub_parts(target: str) -> list[Part]:
    """The parts of CORPUS or INDEX, with the sizes and checksums that the hub states."""
    repo, names = MADE_OF[target]
    try:
        files = {file.path: file for file in HfApi().get_paths_info(repo, names, repo_type="dataset")}
        return [Part(name, repo, files[name].size, files[name].lfs.sha256) for name in names]
    except Exception as error:  # the hub client raises many kinds
        raise _unreachable(f"what {repo} holds", error) from error


def _unreachable(what: str, error: Exception) -> Wiki18Error:
    short = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return Wiki18Error(f"{what} could not be had from the hub ({short}). Run the command again with a connection")


def print_plan(out: Path, parts: dict[str, list[Part]]) -> None:
    """Say what is fetched, what it becomes and the disk it takes; raises Wiki18Error where it does not fit.

    What counts is the moment that holds most: what is made so far, and one download beside what it becomes.
    """
    kept = most = 0
    for target, part in [(target, part) for target, of_target in parts.items() for part in of_target]:
        print(f"{part.repo}/{part.name}: {_gb(part.size)} -> {target}, about {_gb(part.unpacked)}")
        most = max(most, kept + part.unpacked + part.size)
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
    whole = joined.stat().st_size if target == INDEX and joined.is_file() else 0
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if whole >= end + part.size:
            end += part.size
            continue
        try:
            path = Path(hf_hub_download(part.repo, part.name, repo_type="dataset", local_dir=out / "downloads"))
        except Exception as error:
            raise _unreachable(part.name, error) from error
        try:
            verify(part, path)
            end = append(part, path, joined, end)
        except (Wiki18Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
            why = f"{part.name} is cut off or altered ({error}); it is removed; run the command again"
            raise Wiki18Error(why) from None
        finally:
            path.unlink()
    os.truncate(joined, end)
    os.replace(joined, out / target)
    write_json(out / FINISHED, finished(out) | {target: end})
    shutil.rmtree(out / "downloads", ignore_errors=True)  # the hub client's own notes


def verify(part: Part, path: Path) -> None:
    """Raises Wiki18Error if the file's sha256 is not the one stated (the hub client checks the size alone)."""
    digest = hashlib.sha256()
    with path.open("rb") as file, tqdm.wrapattr(file, "read", part.size, desc=f"verifying {part.name}") as watched:
        while block := watched.read(BLOCK):
            digest.update(block)
    if part.sha256 != digest.hexdigest():
        size = path.stat().st_size
        raise Wiki18Error(f"{size:,} bytes of {part.size:,}; sha256 {digest.hexdigest()}, not {part.sha256}")


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
