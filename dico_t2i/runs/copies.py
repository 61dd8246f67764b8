"""The copy of a run at a URL, such as an object store (``checkpoint.path``). It is laid out like the run's folder.

A checkpoint there is complete once it has its manifest, as on disk. Its shards are not downloaded: a folder with only
the manifest, and the URL in the file ``uploaded``, is a checkpoint whose shards are read at the URL.
"""

import hashlib
import shutil
from pathlib import Path

from dico_t2i import remote
from dico_t2i.files import write_atomically
from dico_t2i.runs.checkpoint import LATEST, UPLOADED, checkpoint_folders
from dico_t2i.runs.folder import MANIFEST, RunFolder

RECORDS = ("config.yaml", "metrics.jsonl", "wandb_id")  # the files of a run that a resume elsewhere needs

_CACHE = Path("~/.cache/dico_t2i/runs")


def run_url(path: str, name: str) -> str:
    """The URL, or the absolute path, of a run's copy. path: the value of ``checkpoint.path``."""
    place = path.rstrip("/") if remote.is_url(path) else Path(path).expanduser().absolute()
    return f"{place}/{name}"


def complete_steps(files: dict[str, int]) -> list[str]:
    """The folders of the complete checkpoints, oldest first. files: those below the run's URL."""
    folders = (name.split("/") for name in files if name.endswith(f"/{MANIFEST}"))
    return sorted(parts[1] for parts in folders if parts[0] == "checkpoints" and parts[1].startswith("step-"))


def fetch(run: RunFolder, url: str) -> None:
    """Bring what a run's folder lacks from its copy: the records, and the manifests of the complete checkpoints.

    Checkpoints that were set aside in the folder stay so. Raises OSError, and UrlError for a URL that cannot be used.
    """
    there = remote.files(url)
    for name in RECORDS:
        if name in there and not (run.path / name).exists():
            _download(f"{url}/{name}", run.path / name)
    for name in complete_steps(there):
        folder = run.checkpoints / name
        aside = run.checkpoints / name.replace("step-", "decayed-")
        if not (folder / MANIFEST).exists() and not aside.exists():
            _download_manifest(url, folder)
    if f"checkpoints/{LATEST}" in there and not (run.checkpoints / LATEST).exists():
        _download(f"{url}/checkpoints/{LATEST}", run.checkpoints / LATEST)


def opened(place: str | Path) -> Path:
    """The folder of a run or checkpoint; for one at a URL, a folder in the cache with its records and manifests.

    Raises ValueError if there is no run at the URL, and OSError.
    """
    if isinstance(place, Path):
        return place
    url, _, step = place.rstrip("/").partition("/checkpoints/")
    there = remote.files(url)
    if RECORDS[0] not in there:
        raise ValueError(f"{place}: no run there (config.yaml, checkpoints/)")
    run = RunFolder(_CACHE.expanduser() / hashlib.sha256(url.encode()).hexdigest()[:16], remote.base_name(url))
    for name in (name for name in RECORDS if name in there):
        _download(f"{url}/{name}", run.path / name)
    steps = complete_steps(there)
    for name in steps:
        _download_manifest(url, run.checkpoints / name)
    for folder in checkpoint_folders(run.checkpoints):
        if folder.name not in steps:  # deleted there since the last time
            shutil.rmtree(folder, ignore_errors=True)
    return run.checkpoints / (step if step != LATEST else steps[-1]) if step else run.path


def _download_manifest(url: str, folder: Path) -> None:
    """Make a folder for a complete checkpoint whose shards stay at the URL."""
    there = f"{url}/checkpoints/{folder.name}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / UPLOADED, there.encode())
    _download(f"{there}/{MANIFEST}", folder / MANIFEST)


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = remote.read(url)
    if path.suffix == ".jsonl":  # it may have been copied while a line was written
        content = content[: content.rfind(b"\n") + 1]
    write_atomically(path, content)
