"""Weight files from the Hub into its cache, going on where an earlier run was cut off.

The Hub's own client (2.x) throws away what it had of a file when a run ends; here it stays beside
the cache's blobs until the whole file has the hash that the Hub names. Knows no models.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from tsugiki.errors import HubError
from tsugiki.files import held, sha256_file

HASH = re.compile("[0-9a-f]{64}")


def fetch_weights(name: str, info: Any, blobs: Path) -> None:
    """Download what is missing of a model's safetensors files; the client links them afterwards.

    Args:
        info: what the Hub says of the model, with the files' sizes and hashes.
        blobs: the cache's folder of the model's files, each under its hash.

    Raises:
        HubError: a file that came whole and is not what the Hub names.
        The client's errors, and OSError: cut off; what has arrived is kept.
    """
    from huggingface_hub import constants

    for sibling in info.siblings or []:
        lfs = sibling.lfs
        if lfs is None or not sibling.rfilename.endswith(".safetensors"):
            continue  # small: not worth a second request
        known = HASH.fullmatch(lfs.sha256) and lfs.size <= constants.MAX_HTTP_DOWNLOAD_SIZE
        if known and "consolidated" not in sibling.rfilename and "/" not in sibling.rfilename:
            _fetch(name, info.sha, sibling.rfilename, lfs.size, blobs / lfs.sha256)


def _fetch(name: str, commit: str, file: str, size: int, blob: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{blob.name}.part")
    part.touch()
    try:
        with held(part), open(part, "ab") as stream:
            if stream.tell() > size:
                stream.truncate(0)
            url = hf_hub_url(name, file, revision=commit)
            headers = build_hf_headers()
            place = get_hf_file_metadata(url).location
            if urlparse(place).netloc != urlparse(url).netloc:
                headers.pop("authorization", None)  # another host's signed address
            http_get(
                place, stream, resume_size=stream.tell(), headers=headers, expected_size=size,
                displayed_filename=file,
            )  # fmt: skip
            stream.flush()
            if sha256_file(part) != blob.name:
                part.unlink()
                raise HubError(
                    f"{file} of {name} arrived, and is not what the Hub says it is",
                    fix="run the same command again: it is fetched anew",
                )
            part.replace(blob)
    except BlockingIOError:
        return  # another process fetches it; the client's own way costs only the double
