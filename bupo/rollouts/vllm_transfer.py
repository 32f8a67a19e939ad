"""Sends the trainer's weights to vLLM servers through vLLM's API for the transfer of weights.

Servers with GPUs receive them by NCCL (vLLM's transfer engine `nccl`). vLLM has no transfer engine
for CPUs, so this module adds one, which broadcasts by gloo over TCP. vLLM finds it by the entry
point in pyproject.toml and loads this module in each of its processes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferInitInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from bupo.config import RunError
from bupo.rollouts.vllm_serving import NCCL, Server

TIMEOUT = timedelta(minutes=2)
"""For one tensor to arrive, and for a server to connect"""


def own_address(host: str, port: int) -> str:
    """Returns the address of this machine in the network in which it reaches the host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return str(probe.getsockname()[0])


def _gloo(store: TCPStore, rank: int, address: str, world_size: int) -> Any:
    """Makes the group of the trainer, rank 0, and the workers of a server. address: that of this
    machine in the network of the group; without it, gloo would take that of the host's name."""
    group: Any = ProcessGroupGloo  # its stubs are incomplete
    options = group._Options()
    options._devices = [group.create_device(hostname=address)]
    options._timeout = TIMEOUT
    return group(store, rank, world_size, options)


def _broadcast(group: Any, tensor: Tensor) -> None:
    """Sends a tensor from rank 0 to all others, which write it into theirs."""
    options = torch._C._distributed_c10d.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()


class Source(WeightSource):
    """What the next transfer sends, in the data type of the server."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self.weights: list[tuple[str, Tensor]] = []

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, self._dtype, tuple(t.shape)) for name, t in self.weights]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights:
            yield name, tensor.to(self._device, self._dtype).contiguous()


@dataclass
class GlooInit(WeightTransferInitInfo):
    """How the workers of a server find the trainer."""

    address: str
    port: int
    world_size: int


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """The side of the server: receives what GlooSender sends, one tensor after the other."""

    init_info_cls: Any = GlooInit

    def init_transfer_engine(self, init_info: Any) -> None:
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = TCPStore(init_info.address, init_info.port, timeout=TIMEOUT)
        address = own_address(init_info.address, init_info.port)
        self._group = _gloo(store, rank, address, init_info.world_size)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        model: Any = self.model
        names, dtypes, shapes = update_info.names, update_info.dtype_names, update_info.shapes
        for name, dtype, shape in zip(names, dtypes, shapes):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            _broadcast(self._group, tensor)
            model.load_weights([(name, tensor)])

    def shutdown(self) -> None:
        self._group = None


class GlooSender:
    """The side of the trainer, with the methods of vLLM's TrainerWeightTransferEngine."""

    def __init__(self, server: Server, source: Source, address: str, world_size: int) -> None:
        self._server, self._source = server, source
        # Port 0: any that is free.
        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        init = GlooInit(address, self._store.port, world_size)
        joining = _beside(lambda: _gloo(self._store, 0, address, world_size))
        try:
            server.init_weight_transfer_engine(asdict(init))
        except RunError as error:
            raise RunError(
                f"{error}; the server has to reach this machine at {address}, at port {init.port} "
                "and those that gloo chooses: does a firewall stop it?"
            ) from None
        self._group = joining.result()

    def send_weights(self) -> None:
        """Sends the weights of the source, and returns once the server uses them."""
        described = self._source.metadata()
        update = NCCLWeightTransferUpdateInfo(
            names=[m.name for m in described],
            dtype_names=[str(m.dtype).removeprefix("torch.") for m in described],
            shapes=[list(m.shape) for m in described],
        )
        self._server.start_weight_update()
        sending = _beside(self._broadcast_all)
        self._server.update_weights(asdict(update))
        sending.result()
        self._server.finish_weight_update()

    def _broadcast_all(self) -> None:
        for _, tensor in self._source:
            _broadcast(self._group, tensor)

    def shutdown(self) -> None:
        self._group.shutdown()


def _beside(work: Callable[[], Any]) -> Future[Any]:
    """Starts work that needs the server to do its part at the same time. If the server refuses, the
    thread is left behind, and does not keep the program from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


class _NcclServer:
    """A server as NCCL's sender needs it: if an update fails there, the broadcast here, which would
    wait for ever, is aborted."""

    def __init__(self, server: Server) -> None:
        self.server, self.sender = server, cast(Any, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.server, name)

    def update_weights(self, update_info: Any) -> None:
        try:
            self.server.update_weights(update_info)
        except RunError:
            self.sender.shutdown()
            raise


def _nccl_sender(server: Server, source: Source, address: str, world_size: int) -> Any:
    """Returns vLLM's own sender for servers with GPUs."""
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerInitInfo,
        NCCLTrainerWeightTransferEngine,
    )

    with socket.socket() as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    init = NCCLTrainerInitInfo(
        master_address=address,
        master_port=port,
        world_size=world_size,
        packed_buffer_size_bytes=128 << 20,
        rank=0,
    )
    client: Any = _NcclServer(server)
    client.sender = NCCLTrainerWeightTransferEngine.trainer_init(init, client=client, source=source)
    return client.sender


class Sender:
    """Sends weights to a server."""

    def __init__(self, server: Server, backend: str, dtype: torch.dtype) -> None:
        """backend: the transfer engine of the server. dtype: that of its weights."""
        where = urlsplit(server.url)
        address = own_address(str(where.hostname), where.port or 80)
        world_size = 1 + int(server.call("get_world_size")["world_size"])
        device = torch.device("cuda" if backend == NCCL else "cpu")
        self._server, self._source = server, Source(dtype, device)
        make = _nccl_sender if backend == NCCL else GlooSender
        self._sender: Any = make(server, self._source, address, world_size)

    def send(self, weights: list[tuple[str, Tensor]]) -> None:
        """Sends weights, and returns once the server uses them."""
        self._source.weights = weights
        if torch.cuda.is_available():  # NCCL's streams do not wait for the one that made them
            torch.cuda.current_stream().synchronize()
        self._sender.send_weights()
        self._source.weights = []

    def close(self) -> None:
        if not self._server.ended():
            self._server.disconnect()
        self._sender.shutdown()
