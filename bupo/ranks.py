"""The processes of a run: a single one, or ranks 0, 1, ... that torchrun has started.

Control is replicated and work is divided: all ranks hold the same rollouts and take the same
decisions, and each generates, grades and computes its share. So all of them must call the functions
below in the same order. In a single process, each function returns what it is given.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import device_mesh
from torch.distributed.tensor import DTensor

from bupo.config import ConfigError, RunError, first_line

Item = TypeVar("Item")
Result = TypeVar("Result")

_thread = threading.local()
_MESSAGE = 16 << 20
"""Number of values that are sent at once"""
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Set by torchrun"""


def world() -> int:
    """Returns the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the rank that writes files and speaks to people."""
    return rank() == 0


@contextmanager
def joined(minutes: float) -> Iterator[None]:
    """Inside, this process is a rank if torchrun has started it. minutes: how long a rank waits for
    the others before it gives up. Raises ConfigError if a variable of torchrun is missing."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1") or dist.is_initialized():
        yield
        return
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start "
            "several processes with torchrun, or unset WORLD_SIZE"
        )
    gpu = torch.cuda.is_available()
    if gpu:  # its GPU becomes the only one, as libraries such as vLLM take the first that they see
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        local = int(os.environ["LOCAL_RANK"])
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
        os.environ["LOCAL_RANK"] = "0"  # the device that vLLM takes
        torch.cuda.set_device(0)
    network = _interface(os.environ["MASTER_ADDR"])
    here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if network and (here or network != "lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
    # Python objects travel by gloo, parameters and gradients of a GPU by NCCL.
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        yield
        if dist.is_initialized():  # vLLM destroys it as well; after an error, others may be gone
            dist.destroy_process_group()
    finally:
        # Gloo's threads need Python's lock to release the tensors that they have exchanged. If the
        # process ends while one of them waits for it, the process is aborted.
        time.sleep(0.2)  # without the lock


def _interface(host: str) -> str:
    """Returns the network interface by which this machine reaches a host, if it is found. Gloo
    would take that of this machine's own name, which is often one that others do not reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return ""
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                request = struct.pack("256s", name.encode())
                found = fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24]  # SIOCGIFADDR
                if socket.inet_ntoa(found) == address:
                    return name
    return ""


def speaks_first(about: str) -> bool:
    """Returns whether this rank is the first one with something to say about a subject."""
    if world() == 1:
        return True
    try:
        return int(_store().add(f"bupo/{about}", 1)) == 1
    except RuntimeError:  # the store has ended with its rank
        return True


def someone_spoke(about: str) -> bool:
    """Returns whether a rank has said something about a subject."""
    try:
        return int(_store().add(f"bupo/{about}", 0)) > 0
    except RuntimeError:
        return False


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


# ---- objects -----------------------------------------------------------------------------------


def new_group() -> Any:
    """Returns a way for all ranks to exchange objects beside the usual one; None for a single
    process."""
    # A rank that has ended is noticed at once, and any other one may write for hours.
    return dist.new_group(backend="gloo", timeout=timedelta(days=7)) if world() > 1 else None


@contextmanager
def by_way_of(other: Any) -> Iterator[None]:
    """Inside, objects that this thread exchanges take a way that new_group() has returned."""
    _thread.group = other
    try:
        yield
    finally:
        _thread.group = None


def group() -> Any:
    """Returns the process group by which this thread exchanges objects; None: the usual one."""
    return getattr(_thread, "group", None)


def gathered(mine: Item) -> list[Item]:
    """Returns what each rank has, in the order of the ranks."""
    if world() == 1:
        return [mine]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, mine, group=group())
    return found


def share(items: Sequence[Item], together: int = 1) -> list[Item]:
    """Returns the items that this rank works on: every world-th. together: number of consecutive
    ranks that work on the same ones."""
    return list(items[rank() // together :: world() // together])


def spread(items: Sequence[Item], work: Callable[[list[Item]], Sequence[Result]]) -> list[Result]:
    """Returns work(items), of which each rank does its share. work: gives a result for each."""
    parts = gathered(list(work(share(items))))
    return [parts[place % world()][place // world()] for place in range(len(items))]


def from_all(make: Callable[[], Result]) -> list[Result]:
    """Returns what each rank makes. An OSError on one of them is raised on all."""
    mine: Result | None = None
    failure: OSError | None = None
    try:
        mine = make()
    except OSError as error:
        failure = error
    parts = gathered((mine, failure))
    if failed := [error for _, error in parts if error is not None]:
        raise failed[0]
    return [cast(Result, found) for found, _ in parts]


def any_of(flag: bool) -> bool:
    """Returns whether the flag is set on some rank."""
    return any(gathered(flag))


def first_of(value: Result | None) -> Result | None:
    """Returns the value of the first rank on which it is not None."""
    return next((found for found in gathered(value) if found is not None), None)


def from_first(make: Callable[[], Result]) -> Result:
    """Returns what rank 0 makes. An exception there is raised on all ranks, on the others
    perhaps as a RunError."""
    if world() == 1:
        return make()
    made: list[Any] = [None, None]
    failure: BaseException | None = None
    if is_first():
        try:
            made[0] = make()
        except BaseException as error:
            failure, simple = error, isinstance(error, OSError | ConfigError | RunError)
            made[1] = error if simple else RunError(first_line(error))  # not all can be sent
    dist.broadcast_object_list(made, group=group())
    if failure is not None:
        raise failure
    if made[1] is not None:
        raise made[1]
    result: Result = made[0]
    return result


# ---- tensors -----------------------------------------------------------------------------------


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its sum over the ranks. Small ones are sent together."""
    if world() == 1:
        return
    for message in _messages(tensors):
        sent = torch.cat([x.reshape(-1) for x in message]) if len(message) > 1 else message[0]
        dist.all_reduce(sent)
        if len(message) > 1:
            for x, values in zip(message, sent.split([x.numel() for x in message])):
                x.copy_(values.view_as(x))


def _messages(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yields the tensors in groups of at most _MESSAGE values, or of a single one."""
    message: list[Tensor] = []
    for tensor in tensors:
        if message and sum(x.numel() for x in message) + tensor.numel() > _MESSAGE:
            yield message
            message = []
        message.append(tensor)
    if message:
        yield message


def copies(tensor: Tensor) -> int:
    """Returns the number of ranks that hold the same rows of a divided tensor."""
    mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
    return 1 if mesh is None else mesh.size() // mesh.size(-1)


def local(tensor: Tensor) -> Tensor:
    """Returns the rows of a divided tensor that this rank holds, or the tensor if it is whole. Both
    have the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns all rows of a divided tensor, or the tensor if it is whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_on_first(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors, whole, in the memory of the host on rank 0, and nothing on other ranks.
    In a single process, returns them as they are."""
    if world() == 1:
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        value = whole(tensor.detach())
        if is_first():
            found[name] = value.cpu()
    return found


def like(rows: Tensor, divided: Tensor) -> Tensor:
    """Returns the tensor that is divided like another one and of which this rank holds these rows,
    or the rows if the other one is whole. The rows may be on the host."""
    # Of a scalar, such as a counter of steps, every rank has a copy.
    if not isinstance(divided, DTensor) or not rows.dim():
        return rows
    mesh = divided.device_mesh
    if rows.device.type != mesh.device_type:
        mesh = mesh_of(rows.device.type, tuple(mesh.shape), mesh.mesh_dim_names)
    shape, stride = divided.shape, divided.stride()
    return DTensor.from_local(rows, mesh, divided.placements, shape=shape, stride=stride)


def copied_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies in the memory of the host, divided in the same way."""
    return {n: like(local(x).to("cpu", copy=True), x) for n, x in tensors.items()}


@lru_cache  # each call would make new groups of ranks
def mesh_of(
    device: str, shape: tuple[int, ...], names: tuple[str, ...] | None = None
) -> device_mesh.DeviceMesh:
    """Returns an arrangement of all ranks. All of them make the first call with these arguments."""
    return device_mesh.init_device_mesh(device, shape, mesh_dim_names=names)
