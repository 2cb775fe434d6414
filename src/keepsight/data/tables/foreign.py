"""What is no data file of ours, and what to do with it."""

from __future__ import annotations

import tarfile
from pathlib import Path

from keepsight.data.images import PICTURES

_ELSEWHERE = {
    ".zip": "an archive; unpack it and name the folder",
    ".tar": "an archive; unpack it and name the folder",
    ".tgz": "an archive; unpack it and name the folder",
    ".zst": "packed by Zstandard; unpack it: zstd -d FILE",
    ".xlsx": "a spreadsheet; save it as CSV",
    ".xls": "a spreadsheet; save it as CSV",
    ".arrow": "one shard of a saved dataset; name the folder that holds it",
    ".pkl": "a pickle, which runs code when it is read; save it as Parquet or JSON lines",
    ".txt": "plain text; if it holds JSON lines, call it .jsonl, and a table with a header .csv or .tsv",
}


def what_to_do(path: Path) -> str:
    """What a file is that is not read, and what to do with it."""
    suffix = ".tar" if ".tar" in path.suffixes else path.suffix.lower()
    return _webdataset(path) or _ELSEWHERE.get(suffix, "no data file")


def _webdataset(path: Path) -> str | None:
    """What to do with an archive of pictures and words under one key each; None for another file."""
    if ".tar" not in path.suffixes or not tarfile.is_tarfile(path):
        return None
    with tarfile.open(path) as archive:
        names = [Path(one.name) for one, _ in zip(archive, range(8), strict=False)]
    keys = {one.stem for one in names if one.suffix.lower() in PICTURES}
    words = sorted({one.suffix[1:] for one in names if one.stem in keys and one.suffix.lower() not in PICTURES})
    if not words:
        return None
    picture = next(one.suffix[1:] for one in names if one.suffix.lower() in PICTURES)
    return (
        f'a WebDataset ({picture} with {", ".join(words)}); make it Parquet: python -c "import datasets; '
        f"datasets.load_dataset('webdataset', data_files='{path.name}', split='train', cache_dir='webdataset')"
        f".to_parquet('{path.stem}.parquet')\", and say what its columns are: --columns "
        f"image={picture},text={words[-1]}"
    )
