"""The processes that train one model: they score together, choose alike, and prune all or none.

Every step that cannot be taken back is preceded by an exchange: each rank says that it is ready, or why it is not, and
if one is not, all refuse with its reason. Exchanges go over a gloo group of their own, so that a rank which is out of
step is waited for, at most as long as the training's process group waits, and its gradients are never taken for votes.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from ..errors import SurgeryError
from ..plan.types import Plan
from .ddp import check_rebuildable, rebuild, wrappers
from .sharded import group_of

log = logging.getLogger("pat_fast")
_numbers = count()


class Peers:
    """What the pruner of ``model`` asks of the other ranks; in a single process every question answers itself.

    The ranks are those of the process group of the ``DistributedDataParallel`` around the model, or over which it is
    sharded, which is looked for when a prune is due, or of ``group``. Another model is pruned by each process alone.
    """

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        self._model = weakref.ref(model)
        self._number = next(_numbers)
        self._given = group
        self._group: Any = None
        self._control: Any = None
        self._wrappers: list[Any] = []
        self._round = 0
        self._what = ""
        self._active = False
        self._failed = False
        self._swapped = False

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Around a prune that all ranks are due to make: an error in it, on any rank, is an error on all.

        Raises:
            SurgeryError: another rank failed, is at another point (``what``) or did not come.
        """
        if self._active or not (dist.is_available() and dist.is_initialized()):
            yield
            return
        self._find()
        self._active, self._failed, self._swapped = self._group is not None, False, False
        self._what = what
        try:
            for ddp in self._wrappers:
                check_rebuildable(ddp)
            yield
            self._follow()
            self.agree("the end")
        except BaseException as error:
            self._follow()
            if self._active and not self._failed:
                self._tell(error)
            raise
        finally:
            self._active = False
            self._wrappers = []

    def begin(self) -> None:
        """Called before the first parameter is swapped."""
        self._swapped = True

    def ready(self) -> None:
        """Called when the new tensors are made and all can still be undone: wait until they are on every rank.

        Raises:
            SurgeryError: on another rank they could not be made.
        """
        self.agree("the new tensors")

    def _follow(self) -> None:
        """Parameters that were swapped, or swapped and put back, have lost the reducer's hooks."""
        swapped, self._swapped = self._swapped, False
        for ddp in self._wrappers if swapped else ():
            rebuild(ddp)

    def mean(self, scores: NDArray[np.float64], plan: Plan, eligible: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The mean over all ranks of ``scores [N]``, the same to the bit on all of them.

        Raises:
            SurgeryError: the ranks have other plans, or one of them failed.
        """
        if not self._active:
            return scores
        total = torch.from_numpy(scores.copy())
        self.agree("the plan", plan_digest(plan), eligible.tobytes())
        self._talk("the scores", lambda: dist.all_reduce(total, group=self._control))
        # Gloo sums a chunk on one rank and hands it round, but does not promise to: the first rank's sums count.
        first = dist.get_process_group_ranks(self._control)[0]
        self._talk("the scores", lambda: dist.broadcast(total, first, group=self._control))
        return (total / dist.get_world_size(self._control)).numpy()

    @property
    def active(self) -> bool:
        """Whether there are others, in a prune that all make."""
        return self._active

    def of_first(self, what: str, value: Any) -> Any:
        """``value`` as the first rank has it: what is measured comes out a little different on each.

        Raises:
            SurgeryError: a rank failed.
        """
        if not self._active:
            return value
        held = [value]
        first = dist.get_process_group_ranks(self._control)[0]
        self._talk(what, lambda: dist.broadcast_object_list(held, first, group=self._control))
        return held[0]

    def agree(self, what: str, *content: bytes) -> None:
        """Wait until every rank is here, with the same ``content``.

        Raises:
            SurgeryError: a rank failed, has come to another point, or has other content; on all ranks.
        """
        if self._active:
            self._exchange(what, hashlib.blake2b(b"".join(content), digest_size=16).hexdigest(), None)

    def _find(self) -> None:
        """The wrappers and the group of the model as it is trained now."""
        model = self._model()
        self._wrappers = wrappers(model) if model is not None else []
        group = self._given
        if group is None and self._wrappers:
            group = self._wrappers[0].process_group
        if group is None and model is not None:
            group = group_of(model)
        if group is not None and dist.get_world_size(group) == 1:
            group = None
        if group is not self._group:
            self._group, self._control, self._round = group, None, 0

    def _tell(self, error: BaseException) -> None:
        """Let the others know why this rank does not go on."""
        try:
            self._exchange("an error", "", f"{type(error).__name__}: {error}")
        except SurgeryError as other:
            log.debug("pat_fast: %s", other)

    def _exchange(self, what: str, digest: str, error: str | None) -> None:
        told: list[Any] = [None] * dist.get_world_size(self._group)
        point = f"{self._what}, {what}"
        self._talk(what, lambda: dist.all_gather_object(told, (point, digest, error), group=self._control))
        ranks = dist.get_process_group_ranks(self._group)
        failed = [(r, reason) for r, (_, _, reason) in zip(ranks, told, strict=True) if reason is not None]
        if failed:
            rank, reason = failed[0]
            self._refuse(f"{point}: rank {rank} failed, so no rank goes on ({reason})")
        first, expected, _ = told[0]
        for rank, (there, found, _) in zip(ranks, told, strict=True):
            if there != first:
                self._refuse(f"rank {rank} is at {there!r}, rank {ranks[0]} at {first!r}; step all ranks alike")
            if found != expected:
                self._refuse(
                    f"{point}: expected the same on all ranks, got another on rank {rank} than on rank {ranks[0]}; "
                    "pass the same example_inputs and the same settings everywhere"
                )

    def _refuse(self, reason: str) -> None:
        self._failed = True
        raise SurgeryError(reason)

    def _talk(self, what: str, act: Any) -> None:
        """Do a collective of the control group; what goes wrong with it says who is missing."""
        wait = self._timeout()
        self._round += 1
        try:
            self._mark()
            if self._control is None:
                self._control = dist.new_group(
                    dist.get_process_group_ranks(self._group), wait, "gloo", use_local_synchronization=True
                )
            act()
        except (RuntimeError, ValueError) as error:  # torch.distributed's errors are RuntimeErrors
            missing = self._missing()
            who = f"rank(s) {', '.join(map(str, missing))} did not come" if missing else "the connection broke"
            self._failed = True
            raise SurgeryError(
                f"{self._what}, {what}: {who} within {wait.total_seconds():.0f} s (the timeout of the process group); "
                "see what they were doing; nothing more is changed on this rank"
            ) from error

    def _timeout(self) -> timedelta:
        for device in ("cpu", "cuda"):
            try:
                return self._group._get_backend(torch.device(device)).options._timeout
            except (RuntimeError, AttributeError):
                continue
        return dist.default_pg_timeout

    def _key(self, rank: int) -> str:
        return f"pat_fast/{self._number}/{self._group.group_name}/{rank}"

    def _mark(self) -> None:
        """Leave a note of how far this rank has come; only read when one is missing."""
        dist.distributed_c10d._get_default_store().set(self._key(dist.get_rank()), str(self._round))

    def _missing(self) -> list[int]:
        try:
            store = dist.distributed_c10d._get_default_store()
            ranks = dist.get_process_group_ranks(self._group)
            come = {r: int(store.get(self._key(r))) if store.check([self._key(r)]) else 0 for r in ranks}
        except RuntimeError:  # the store went with the rank that kept it
            return []
        return [r for r, rounds in come.items() if rounds < self._round]


def plan_digest(plan: Plan) -> bytes:
    """A hash of what a plan says of the structure; not of its work, which depends on the example inputs."""
    found = hashlib.blake2b(digest_size=16)
    found.update(repr([(g.root, g.start, g.stop, g.layers, g.members, g.multiple) for g in plan.groups]).encode())
    found.update(plan.unit.tobytes())
    for tensor in plan.tensors:
        found.update(repr((tensor.name, tensor.shape, tensor.groups, tensor.whole_groups)).encode())
        for axis in tensor.axes:
            found.update(repr((axis.dim, axis.role)).encode())
            found.update(axis.channels.tobytes())
    return found.digest()
