"""What a trainer sees: `CuratedDataset`, an IterableDataset of batches, and `CuratedLoader`, which iterates it.

State is a position in the epoch, counted in global rows, so the state of any rank is that of all: a training goes on
from it with another number of ranks or workers, and a rank that joins late takes it from one that is there. It also
says what it is a position in, and is refused where that differs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from pipeline.errors import ConfigError, MissingExtra
from pipeline.output.loader.collate import language_model, tensors
from pipeline.output.loader.plan import Epoch, Settings, Share, batches_of, fit
from pipeline.output.loader.reading import ROW, VALID, read_batches
from pipeline.output.loader.source import RowSource, default_columns, open_curated, open_order, open_packed

try:
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info
except ImportError as error:
    raise MissingExtra("the loader", "models", "torch") from error

FORMAT = "tamis-loader-1"
MIB = 1 << 20
READ_AHEAD = {False: 2, True: 8}
"""Windows loaded before they are needed, each by a thread: few from local files, where decoding is the work; more from
an object store, where waiting is."""

Collate = Callable[[pa.Table], Any]


class CuratedDataset(IterableDataset):  # type: ignore[misc]  # torch ships no types here
    """Batches of a curated run, the same whatever reads them: give it to a DataLoader with `batch_size=None`.

    `run`: directory of a curated run, local or on an object store. What is read is its curated rows, or, by name, one
    of its packed sets (`packed`), or the curated rows in a stored order (`order`). `split="validation"`: the file that
    the nanochat layout sets apart.

    `global_batch`: rows of a batch over all ranks; the number of ranks must divide it. `rank` and `world_size` are
    those of torch.distributed, or of the environment (RANK, WORLD_SIZE), where they are not given.

    `shuffle`: anew in every epoch; by default for everything but a stored order, or sequences packed in one, which come
    as they lie. `lanes` and `phases`: up to how many ranks, and worker processes of each, read row groups that no other
    reads. `shuffle_mb`: decoded MiB of the rows that are shuffled together, over all ranks. These four and `seed` fix
    the order; see `plan`.

    `drop_last`: whether the rows that fill no batch are left out; else the last batch is filled up and every batch has
    `tamis_valid`. `columns`: what is read; `numbered` adds `tamis_row`, a row's ordinal over the curated files (of a
    packed set, the sequence's). `collate`: from a table (rows of one batch of this rank) to a batch; by default
    `language_model` for packed sequences, else `tensors`. `read_ahead`: windows that are loaded before they are needed.

    Iterating yields what is left of the epoch and moves on to the next one. Raises ConfigError for settings that do not
    fit, CorpusError where the files are not those that the run describes, here or when they are read.
    """

    def __init__(
        self,
        run: str | Path,
        global_batch: int,
        *,
        packed: str | None = None,
        order: str | None = None,
        split: Literal["train", "validation"] = "train",
        columns: Sequence[str] | None = None,
        collate: Collate | None = None,
        shuffle: bool | None = None,
        seed: int = 0,
        drop_last: bool = True,
        lanes: int = 8,
        phases: int = 2,
        shuffle_mb: float = 512,
        rank: int | None = None,
        world_size: int | None = None,
        read_ahead: int | None = None,
        numbered: bool = False,
    ) -> None:
        super().__init__()
        least = {"global_batch": global_batch, "lanes": lanes, "phases": phases, "read_ahead": read_ahead or 1}
        if wrong := next((name for name, value in least.items() if value < 1), None):
            raise ConfigError(f"{wrong}: must be at least 1, not {least[wrong]}")
        if not 0 <= seed < 1 << 63:
            raise ConfigError(f"seed: must be from 0 to 2**63 - 1, not {seed}")
        if (rank is None) != (world_size is None):
            raise ConfigError("rank: give rank and world_size, or neither")
        if sum([packed is not None, order is not None, split != "train"]) > 1:
            raise ConfigError("packed, order, split: name one of them; a packed set has its order in it")
        self.source = _source(str(run), packed, order, split)
        self.columns = _columns(self.source, columns)
        self.collate = collate or (language_model if self.source.packed and not columns else tensors)
        self.read_ahead = read_ahead or READ_AHEAD[self.source.remote]
        self.numbered = numbered
        wanted = not self.source.ordered if shuffle is None else shuffle
        settings = Settings(global_batch, seed, wanted, lanes, phases, 1, drop_last)
        self.settings = fit(settings, self.source.sizes, self.source.row_bytes, shuffle_mb * MIB)
        if not batches_of(self.rows, self.settings):
            raise ConfigError(
                f"global_batch: {global_batch} rows make no full batch of {self.rows:,} rows: lower it, or set "
                "drop_last=False"
            )
        self._given = None if rank is None or world_size is None else (rank, world_size)
        self._sent_from: tuple[int, int] | None = None
        """Rank and world size of the process that pickled this; a worker's are those, another rank's are its own."""
        self._opened_by = os.getpid()
        self._epoch = 0
        self._next = 0
        self._worker: tuple[int, int] | None = None
        """The worker process that `_next` is of, and how many there are; None where it is the next batch of all."""
        self.share(0, 1)

    @property
    def rows(self) -> int:
        """Rows of an epoch, over all ranks."""
        return int(self.source.sizes.sum())

    @property
    def fingerprint(self) -> str:
        """Of the rows and the files that they lie in."""
        return self.source.fingerprint

    @property
    def epoch(self) -> int:
        return self._epoch

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return batches_of(self.rows, self.settings)

    # ---- position

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; a position in that very epoch is kept."""
        if epoch != self._epoch:
            self.seek(epoch * len(self))

    def seek(self, batches: int) -> None:
        """Go to where a training is that has taken so many batches a rank since the beginning of epoch 0."""
        self._epoch, self._next = divmod(batches, len(self))
        self._worker = None

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is, in JSON's types. `rows`: of the epoch, over all ranks, that have been given out."""
        return {
            "format": FORMAT,
            "data": self.fingerprint,
            "settings": asdict(self.settings),
            "epoch": self._epoch,
            "rows": self._next * self.settings.batch,
            "worker": list(self._worker) if self._worker else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of any rank of any world. Raises ConfigError where it is a position in something else."""
        if state.get("format") != FORMAT:
            raise ConfigError(f"state: not of this loader: its format is {state.get('format')!r}, not {FORMAT!r}")
        if state["data"] != self.fingerprint:
            raise ConfigError(
                f"state: taken on rows with fingerprint {state['data']}, those of {self.source.name} here have "
                f"{self.fingerprint}: resume on the set that the training began with, or begin a new epoch on this one"
            )
        mine, other = asdict(self.settings), state["settings"]
        differing = [f"{k}: {other.get(k)} there, {v} here" for k, v in mine.items() if other.get(k) != v]
        if differing:
            raise ConfigError(f"state: taken with other settings ({'; '.join(differing)}), which make another order")
        self._epoch = int(state["epoch"])
        self._next = int(state["rows"]) // self.settings.batch
        self._worker = tuple(state["worker"]) if state["worker"] else None

    # ---- iteration

    @property
    def place(self) -> tuple[int, int]:
        """Rank and world size."""
        if self._given is not None:
            return self._given
        if self._sent_from is not None and get_worker_info() is not None:
            return self._sent_from
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def share(self, worker: int, workers: int) -> Share:
        """What a worker process of this rank takes of the rest of the epoch. Raises ConfigError where no share is."""
        rank, world = self.place
        batch = self.settings.batch
        if not 0 <= rank < world:
            raise ConfigError(f"rank: {rank} is not one of {world}, which are counted from 0")
        if batch % world:
            raise ConfigError(
                f"global_batch: {batch} rows cannot be shared by {world} ranks: take a multiple, such as "
                f"{-(-batch // world) * world}"
            )
        if self._worker is not None and self._worker != (worker, workers):
            raise ConfigError(
                f"state: of worker {self._worker[0]} of {self._worker[1]}, loaded in worker {worker} of {workers}: use "
                "as many workers as before, or CuratedLoader, whose state does not depend on them"
            )
        start = self._next + (worker if self._worker is None else 0)
        return Share(rank * batch // world, (rank + 1) * batch // world, start, workers)

    def __iter__(self) -> Iterator[Any]:
        if self.source.remote and os.getpid() != self._opened_by:
            raise ConfigError(
                "workers: an object store's client does not survive a fork: give the DataLoader "
                "multiprocessing_context='spawn', as CuratedLoader does"
            )
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share = self.share(worker, workers)
        self._next, self._worker = share.start, (worker, workers) if info else None
        return self._rest(share)

    def _rest(self, share: Share) -> Iterator[Any]:
        epoch = Epoch(self.settings, self.source.sizes, self._epoch)
        tables = read_batches(epoch, share, lambda rows: self.source.read(rows, self.columns), self.read_ahead)
        beside = [*([] if self.numbered else [ROW]), *([VALID] if self.settings.drop_last else [])]
        for table in tables:
            self._next += share.step  # before the batch is out: a state that is taken with it has it behind
            yield self.collate(table.drop_columns(beside))
        self._epoch, self._next, self._worker = self._epoch + 1, 0, None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sent_from": self.place}  # a spawned worker has no torch.distributed to ask

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_opened_by": os.getpid()}


class CuratedLoader:
    """Iterates a `CuratedDataset` with worker processes, and knows where the training is, not where the workers are.

    Its state is that of the dataset after the last batch that was given out, so a training resumes with any number of
    workers and ranks. An iteration goes on where the last one stopped, to the end of the epoch; one that begins behind
    the last batch begins the next epoch. Each starts its own workers: `workers=0` reads ahead in threads, which is
    enough unless `collate` is work. They are forked, or spawned where rows come from an object store.
    """

    def __init__(
        self,
        data: CuratedDataset,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
    ) -> None:
        self.data = data
        self.workers = workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.start_method = start_method or ("spawn" if data.source.remote else None)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        taken = self.data.epoch * len(self) + self.data.share(0, 1).start
        self.data.seek(taken)  # behind the last batch is before the first of the next epoch
        several: dict[str, Any] = {}
        if self.workers:
            several = {"prefetch_factor": self.prefetch, "multiprocessing_context": self.start_method}
        loader = DataLoader(
            copy.copy(self.data),  # which moves on as it is read; ours, as batches are given out
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else every iteration would draw from the global one
            **several,
        )
        for count, batch in enumerate(loader, taken + 1):
            self.data.seek(count)
            yield batch

    def set_epoch(self, epoch: int) -> None:
        self.data.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.data.load_state_dict(state)


def _as_it_is(batch: Any) -> Any:
    """In place of torch's default, which looks at every string of a batch."""
    return batch


def _source(run: str, packed: str | None, order: str | None, split: str) -> RowSource:
    if packed is not None:
        return open_packed(run, packed)
    return open_order(run, order) if order is not None else open_curated(run, split)


def _columns(source: RowSource, wanted: Sequence[str] | None) -> tuple[str, ...]:
    columns = tuple(wanted) if wanted is not None else default_columns(source)
    if not columns:
        raise ConfigError("columns: name at least one")
    if missing := next((c for c in columns if c not in source.schema.names), None):
        raise ConfigError(f"columns: {source.name} has no {missing!r}; it has {', '.join(source.schema.names)}")
    if taken := next((c for c in columns if c in (ROW, VALID)), None):
        raise ConfigError(f"columns: {taken!r} is a name of the loader's: rename the column, or leave it out")
    return columns
