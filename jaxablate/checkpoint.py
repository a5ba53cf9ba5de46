"""Checkpoints of one run: Orbax writes them asynchronously, a manifest of digests makes them trustworthy.

    checkpoints/000000100/            what Orbax committed
    checkpoints/000000100.json        its manifest, written after the commit: digests, shapes, identity
    checkpoints/000000100-1a2b3c4d…   one that is being written, under a name that no other process uses
    checkpoints/damaged-000000100…/   one whose digests did not hold, put aside for a look

Of several processes all write their shards, and process 0 the rest. A step counts only if its manifest is
there and every byte it lists still has its checksum: Orbax itself restores an array with a flipped bit, or
casts another dtype, without a word.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from jaxablate import disk, distributed
from jaxablate.errors import UserError

logger = logging.getLogger(__name__)

Arrays = Mapping[str, Any]  # flat: path -> array or ShapeDtypeStruct


def identity(fingerprint: str, data: str) -> str:
    """The identity of a run's checkpoints: its config's fingerprint, and that of the data it is trained on."""
    return f"{fingerprint} on data {data}"


class Checkpoints:
    """The checkpoints in one directory; the caller holds the run's claim, since two writers destroy each other.

    Args:
      directory: made when the first checkpoint is saved.
      identity: fingerprint of the run; a checkpoint of another is refused.
      keep_last: how many regular checkpoints stay; the best one stays besides.
      fence: entered around all that changes what others see; see `Claim.fenced`.
    """

    def __init__(
        self,
        directory: Path,
        identity: str,
        keep_last: int,
        fence: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        self.directory, self.identity, self.keep_last = directory.absolute(), identity, keep_last
        self._fence = fence
        self.notes: list[str] = []  # what was found wrong, for the attempt record
        self._writer: ocp.AsyncCheckpointer | None = None
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    # -------------------------------------------------------------------------------------- writing

    def save(self, step: int, arrays: Arrays, *, regular: bool) -> None:
        """Starts to save; returns once the arrays may be overwritten.

        Everything that a resume from `step` relies on, the metrics rows up to it, must be on disk already.

        Args:
          regular: one to resume from, as opposed to one kept only because it is the best so far.

        Raises:
          OSError: a save failed, this one or the one before it (disk full, directory gone).
        """
        self.wait()
        name = distributed.first(lambda: self._clear(step))
        if not name:
            return  # saved before a resume; equal by the promise of bit-exact continuation
        if self._writer is None:
            logging.getLogger("absl").addFilter(_is_news)
            # Several runs are saved at a time, so each needs barriers of its own.
            own = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.directory.parent.name)
            self._writer = ocp.AsyncCheckpointer(
                ocp.StandardCheckpointHandler(multiprocessing_options=own), multiprocessing_options=own
            )
        path = self.directory / name
        with _errors_of_the_disk(path):
            self._writer.save(path, args=ocp.args.StandardSave(dict(arrays)))
        tree = {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items()}
        self._pending = self._finisher.submit(self._finish, path, step, tree, regular)

    def _clear(self, step: int) -> str:
        """The name under which to write the checkpoint of a step, whose place is free then; empty if it is there."""
        with self._fence():
            if self._manifest(step).exists():
                return ""
            disk.make_private(self.directory)
            if self._path(step).exists():
                shutil.rmtree(self._path(step))  # complete, but killed before its manifest
        return f"{step:09d}-{secrets.token_hex(4)}"

    def wait(self) -> None:
        """Blocks until the newest save is complete with its manifest; raises what went wrong in it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits and ends the threads."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            if self._writer is not None:
                self._writer.close()

    def prune(self, best: int | None) -> None:
        """Removes all but the newest `keep_last` regular checkpoints and that of step `best`.

        Call it when the newest one of *every* member of the cohort is complete: until then an older one may
        be the newest that they all have.
        """
        kept = sorted(self.regular_steps())[-self.keep_last :]
        self.remove(s for s in self.steps() if s not in kept and s != best)

    def _finish(self, written: Path, step: int, tree: Mapping[str, Any], regular: bool) -> None:
        assert self._writer is not None
        with _errors_of_the_disk(written):
            self._writer.wait_until_finished()  # for all processes
        if not distributed.leads():
            return
        manifest = {
            "step": step,
            "regular": regular,
            "identity": self.identity,
            "arrays": tree,
            "files": _digests(written),
        }
        text = disk.encode_row(manifest)
        with self._fence():
            os.rename(written, self._path(step))
            disk.write_json(self._manifest(step), {**manifest, "crc32": zlib.crc32(text)})

    # -------------------------------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """Steps that have a manifest, in order; whether they are sound is for `verify` to say."""
        return sorted(int(p.stem) for p in self.directory.glob("*.json") if p.stem.isdigit())

    def regular_steps(self) -> set[int]:
        """Steps to resume from by their manifests alone, unverified."""
        return {step for step in self.steps() if self._read(step).get("regular")}

    def sound_regular_steps(self) -> list[int]:
        """Steps to resume from. Damaged ones are put aside, with a note; unfinished ones are removed."""
        whole = {self._path(step).name for step in self.steps()}
        for path in self.directory.glob("[0-9]*"):
            if not path.is_dir() or path.name in whole:
                continue
            with self._fence():  # nothing was promised: a save that was killed
                shutil.rmtree(path)
                self._note(f"checkpoint {path.name} has no manifest, so its save never ended; removed")
        sound = []
        for step in self.steps():
            if problem := self.verify(step):
                with self._fence():
                    self._quarantine(step, problem)
            elif self._read(step)["regular"]:
                sound.append(step)
        return sound

    def verify(self, step: int) -> str:
        """What is wrong with the checkpoint of `step`, in words; empty if every digest holds."""
        manifest = self._read(step)
        if not manifest:
            return "its manifest is damaged"
        if manifest["step"] != step:
            return f"it is the checkpoint of step {manifest['step']}"
        found = _digests(self._path(step))
        for name, expected in manifest["files"].items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != expected:
                return f"{name} has other bytes than were written"
        extra = sorted(found.keys() - manifest["files"].keys())
        return f"{extra[0]} was added" if extra else ""

    def names(self, step: int) -> frozenset[str]:
        """The arrays that the checkpoint of `step` has, by its manifest; none if that is damaged."""
        return frozenset(self._read(step).get("arrays", ()))

    def restore(
        self,
        step: int,
        target: Mapping[str, jax.ShapeDtypeStruct],
        *,
        which: Literal["all", "named"] = "all",
    ) -> dict[str, jax.Array]:
        """The arrays of a sound step, laid out as `target` says.

        Args:
          which: `all`: the checkpoint has those of `target` and no others; `named`: others are not read.

        Raises:
          UserError: the checkpoint is of another run, or its arrays have other names, shapes or dtypes.
        """
        manifest = self._read(step)
        here = self._path(step)
        if manifest["identity"] != self.identity:
            raise UserError(
                f"{here}: is a checkpoint of run {manifest['identity']}, not of {self.identity}; use another workdir"
            )
        saved = {name: (dtype, tuple(shape)) for name, (dtype, shape) in manifest["arrays"].items()}
        wanted = {name: (str(x.dtype), tuple(x.shape)) for name, x in target.items()}
        if which == "named":
            saved = {name: array for name, array in saved.items() if name in wanted}
        if saved != wanted:
            names = sorted(n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n))
            name = names[0]
            was, now = (f"{s[0]}{list(s[1])}" if s else "absent" for s in (saved.get(name), wanted.get(name)))
            raise UserError(
                f"{here}: {len(names)} array(s) differ from this program's, first {name}: saved {was}, now {now}; "
                "the code or the config has changed, use another workdir"
            )
        if which == "all":
            handler, args = ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(dict(target))
        else:
            layout = ocp.checkpoint_utils.construct_restore_args(dict(target))
            handler = ocp.PyTreeCheckpointHandler()
            args = ocp.args.PyTreeRestore(dict(target), restore_args=layout, partial_restore=True)
        with ocp.Checkpointer(handler) as reader:
            restored = reader.restore(here, args=args)
        return {name: restored[name] for name in target}

    def remove(self, steps: Iterable[int]) -> None:
        """Removes checkpoints, the manifest first, so that half of one never counts."""
        for step in list(steps):
            with self._fence():
                self._manifest(step).unlink(missing_ok=True)
                shutil.rmtree(self._path(step), ignore_errors=True)

    # ------------------------------------------------------------------------------------ internals

    def _path(self, step: int) -> Path:
        return self.directory / f"{step:09d}"

    def _manifest(self, step: int) -> Path:
        return self.directory / f"{step:09d}.json"

    def _read(self, step: int) -> dict[str, Any]:
        """The manifest, or empty if its own checksum does not hold."""
        try:
            manifest = json.loads(self._manifest(step).read_bytes())
            crc32 = manifest.pop("crc32")
        except (ValueError, KeyError, AttributeError, OSError):
            return {}
        return manifest if zlib.crc32(disk.encode_row(manifest)) == crc32 else {}

    def _quarantine(self, step: int, problem: str) -> None:
        for number in itertools.count():
            aside = self.directory / f"damaged-{step:09d}-{number}"
            if not aside.exists():
                break
        if self._path(step).exists():
            os.replace(self._path(step), aside)
        self._manifest(step).unlink()
        self._note(f"checkpoint of step {step} is damaged ({problem}); put aside as {aside.name}")

    def _note(self, note: str) -> None:
        self.notes.append(note)
        logger.warning("%s: %s", self.directory, note)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what Orbax logs, with its traceback, and raises as well: a full disk is to be one line."""
    return not (record.exc_info and "orbax" in record.pathname)


@contextlib.contextmanager
def _errors_of_the_disk(path: Path) -> Iterator[None]:
    """Raises the error of the operating system within one of Orbax's, which calls a full disk RESOURCE_EXHAUSTED."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        found = re.search(r"\[os_error_code='(\d+)'\]", str(error))
        if not found:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from None


def _digests(directory: Path) -> dict[str, list[int]]:
    """Relative path -> [bytes, crc32] of every file under `directory`."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            crc, size = 0, 0
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    crc, size = zlib.crc32(block, crc), size + len(block)
            found[str(path.relative_to(directory))] = [size, crc]
    return found
