"""Where token stores lie: a folder, gs://bucket/…, s3://bucket/… or memory://…"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts

from lminf.atomic import check_regular
from lminf.errors import InputError

CACHE_BYTES = 128 << 20  # of decoded pieces, by array


class Storage:
    """A folder of objects, each of which appears whole or not at all."""

    def __init__(self, url: str, *, memory: ts.Context | None = None):
        """`memory` holds what lies at memory://…; without one it is gone with this object."""
        self.url = url
        self._context = memory or ts.Context()
        if "://" not in url:
            _check_local(_local(url))
        with self.errors("open"):
            self._root = ts.KvStore.open(spec(self.url, ""), context=self._context).result()

    def json(self, name: str) -> tuple[Any, bytes]:
        """The object's value, None where there is none, and its generation."""
        with self.errors("read"):
            entry = self._root.read(name).result()
        if entry.state != "value":
            return None, entry.stamp.generation
        try:
            return json.loads(entry.value), entry.stamp.generation
        except ValueError as error:
            raise InputError(f"{self.url}/{name} is damaged ({error}); write the store again, into "
                             f"another place") from error  # fmt: skip

    def put_json(self, name: str, value: Any, *, replaces: bytes) -> bytes:
        """The new generation of the object, of which only the generation `replaces` is replaced."""
        with self.errors("write"):
            content = json.dumps(value).encode()
            stamp = self._root.write(name, content, if_equal=replaces).result()
        if not stamp.generation:
            raise InputError(f"another process writes {self.url}; wait for it, or name another "
                             f"store with --out")  # fmt: skip
        return stamp.generation

    def check_absent(self, names: Sequence[str]) -> None:
        """Refuses a place where something lies below one of these names: it is somebody's."""
        for name in names:
            below = ts.KvStore.KeyRange(f"{name}/", f"{name}0")  # "0" follows "/"
            with self.errors("read"):
                entries = self._root.list(below).result()
            if entries:
                raise InputError(
                    f"{self.url}/{entries[0].decode(errors='replace')} is there already and "
                    f"belongs to no token store; name another place with --out"
                )

    def remove(self, name: str) -> None:
        with self.errors("write"):
            self._root.delete_range(ts.KvStore.KeyRange(name, f"{name}\0")).result()

    def array(self, name: str, *, metadata: Any = None, write: bool = False) -> ts.TensorStore:
        """The array of that name; where `metadata` is given, a new one in place of any there."""
        new = metadata is not None
        # What was read is not asked for again: finished stores never change.
        options = {
            "driver": "zarr3",
            "kvstore": spec(self.url, name),
            "recheck_cached_data": "open",
            "cache_pool": {"total_bytes_limit": CACHE_BYTES},
            **({"metadata": metadata} if new else {}),
        }
        write = write or new
        with self.errors("write" if write else "read"):
            return ts.open(
                options,
                read=True,
                write=write,
                create=new,
                delete_existing=new,
                open=not new,
                context=self._context,
            ).result()

    @contextlib.contextmanager
    def errors(self, verb: str) -> Iterator[None]:
        """TensorStore's failures in one sentence."""
        try:
            yield
        except InputError:
            raise
        except (ValueError, OSError) as error:
            reason = str(error).split(" [")[0]
            raise InputError(f"cannot {verb} {self.url}: {reason}; check the place, its free space "
                             f"and your rights there") from error  # fmt: skip


def spec(url: str, name: str) -> Any:
    """What TensorStore opens for a folder of that name in the place; the place itself for ""."""
    path = f"{name}/" if name else ""
    if "://" in url:
        return ts.KvStore.Spec(f"{url.rstrip('/')}/{path}").to_json()
    return {"driver": "file", "path": f"{_local(url)}/{path}"}


def _local(url: str) -> Path:
    return Path(url).expanduser().absolute()


def _check_local(folder: Path) -> None:
    """Refuses pipes and devices in place of what TensorStore would open: it would wait for them."""
    names = [*folder.glob("*.json"), *folder.glob("tokens/**/*"), *folder.glob("ends/**/*")]
    for path in names:
        if not path.is_dir():
            check_regular(path)
