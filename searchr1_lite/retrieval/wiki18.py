"""wiki-18 from the model hub: 21,015,324 passages, and the flat e5 index over them that Search-R1 searches.

`searchr1 index wiki18` fetches, verifies and unpacks what the original fetches by scripts/download.py and unpacks by
hand (its README); `--plan` only says what that takes. A download is removed once it is unpacked or joined. What is
finished is not fetched again, and work that was cut off goes on. The original's BM25 and HNSW indexes are left out.
"""

import gzip
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from tqdm import tqdm

from searchr1_lite.errors import UserError

CORPUS, INDEX = "wiki-18.jsonl", "e5_Flat.index"
MADE_OF = {  # hub dataset and files, in order; the index is its parts joined (Search-R1 README, "cat part_*")
    CORPUS: ("PeterJinGo/wiki-18-corpus", ["wiki-18.jsonl.gz"]),
    INDEX: ("PeterJinGo/wiki-18-e5-index", ["part_aa", "part_ab"]),
}
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
    """CORPUS and, `with_index`, INDEX in the folder `out`; with `plan` say what that takes, and stop.

    Raises Wiki18Error, after which the same call goes on from where it was.
    """
    targets = [target for target in (MADE_OF if with_index else [CORPUS]) if not (out / target).is_file()]
    try:
        parts = {target: hub_parts(target) for target in targets}
        print_plan(out, parts)
        for target in targets if not plan else ():
            make(target, parts[target], out)
    except UserError:
        raise
    except Exception as error:  # the hub client raises many kinds
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise Wiki18Error(
            f"wiki-18 could not be had from the hub ({what}); the same command goes on from here"
        ) from error


def hub_parts(target: str) -> list[Part]:
    """The parts of CORPUS or INDEX, with the sizes and checksums that the hub states."""
    repo, names = MADE_OF[target]
    files = {file.path: file for file in HfApi().get_paths_info(repo, names, repo_type="dataset")}
    return [Part(name, repo, files[name].size, files[name].lfs.sha256) for name in names]


def print_plan(out: Path, wanted: dict[str, list[Part]]) -> None:
    """Say what is fetched and the disk it takes at its worst moment; raises Wiki18Error where it does not fit."""
    kept = most = 0
    for target, parts in wanted.items():
        for part in parts:
            print(f"{part.repo}/{part.name}: {part.size / 1e9:,.2f} GB -> {target}")
            most = max(most, kept + part.unpacked + part.size)
            kept += part.unpacked
    most -= sum(path.stat().st_size for path in (*out.glob("*.new"), *out.glob("downloads/**/*")) if path.is_file())
    free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.is_dir())).free
    print(f"{out}: needs about {max(0, most) / 1e9:,.2f} GB more while at work; {free / 1e9:,.2f} GB are free")
    if most > free:
        raise Wiki18Error(f"it does not fit in {out}; free some space, name another --out, or try --no-index")


def make(target: str, parts: list[Part], out: Path) -> None:
    """CORPUS or INDEX in `out`, from its parts, each verified before it is unpacked or joined.

    Parts of the index that an earlier call joined are not read again. Raises Wiki18Error.
    """
    joined, end = out / f"{target}.new", 0
    out.mkdir(parents=True, exist_ok=True)
    done = joined.stat().st_size if target == INDEX and joined.is_file() else 0
    for part in parts:
        if done < end + part.size:
            path = Path(hf_hub_download(part.repo, part.name, repo_type="dataset", local_dir=out / "downloads"))
            verify(part, path)
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file, joined.open("ab") as to:
                to.truncate(end)
                with tqdm.wrapattr(to, "write", desc=f"{part.name} -> {target}", total=part.unpacked) as watched:
                    shutil.copyfileobj(file, watched, BLOCK)
            path.unlink()
        end += part.size
    if target == INDEX:
        os.truncate(joined, end)
    os.replace(joined, out / target)
    shutil.rmtree(out / "downloads", ignore_errors=True)  # the hub client's own notes


def verify(part: Part, path: Path) -> None:
    """Removes the file and raises Wiki18Error if its sha256 is not the one stated."""
    digest = hashlib.sha256()
    with path.open("rb") as file, tqdm.wrapattr(file, "read", part.size, desc=f"verifying {part.name}") as watched:
        while block := watched.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != part.sha256:
        path.unlink()
        raise Wiki18Error(
            f"{part.name} is cut off or altered: its sha256 is not {part.sha256}; it is removed, run again"
        )
