"""A network for inference that is replayed from CUDA graphs.

A decoder is over a hundred launches, each of which costs the host more time than a small batch costs the GPU. A graph
launches them all at once. It is captured for given shapes and counts of the stages; which sample belongs to which stage
is an input.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .stage_order import StageOrder

__all__ = ["GraphedNetwork"]

WARM_UPS = 3  # calls before a capture: they compile, choose algorithms and allocate


class GraphedNetwork(nn.Module):
    """Calls a network through CUDA graphs where it can: on a GPU, in eval mode, without gradients.

    One graph is captured for every kind of call: shapes and dtypes of the tensors, samples of each stage, autocast's
    dtype, the device. Weights may change between calls in place; moving them drops the graphs. All other calls go to
    the network itself, whose attributes are this one's, too.

    The graphs share their inputs' and activations' memory: call it from one thread and one stream at a time.

    Example::

        model = load_model("runs/mine", device="cuda")
        model.denoiser.network = GraphedNetwork(model.denoiser.network)
        generate(model.denoiser, seeds=range(8), shape=(3, 32, 32))

    Args:
        network: a ``StageNetwork``.
        max_graphs: the graphs that are kept; the one not used for longest goes first.

    Raises:
        TypeError: a network that does not take a :class:`StageOrder`.
        ValueError: ``max_graphs`` below 1.
    """

    def __init__(self, network: nn.Module, max_graphs: int = 64) -> None:
        super().__init__()
        if not getattr(network, "takes_stage_order", False):
            raise TypeError(f"GraphedNetwork: needs a StageNetwork, got {type(network).__name__}")
        if max_graphs < 1:
            raise ValueError(f"GraphedNetwork: max_graphs={max_graphs} must be at least 1")
        self.network, self.max_graphs = network, max_graphs
        self._forget()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def __getstate__(self) -> dict:
        """Without the graphs, which can be neither copied nor written to a file."""
        return {**self.__dict__, "_graphs": OrderedDict(), "_pools": {}}

    def _apply(self, fn, recurse: bool = True):
        """Where parameters go to another place, the graphs would go on reading the old one."""
        self._forget()
        return super()._apply(fn, recurse)

    def _forget(self) -> None:
        self._graphs: OrderedDict[tuple, _Replay] = OrderedDict()
        self._pools: dict[torch.device, object] = {}

    def forward(self, x: Tensor, noise: Tensor, stage, **conditioning: Tensor | None) -> Tensor:
        """As the network. The result is a tensor of its own, which the next call leaves alone."""
        if not _serves(x) or torch.is_grad_enabled() or self.network.training:
            return self.network(x, noise, stage, **conditioning)
        order = StageOrder.of(stage, self.network.num_stages, x.shape[0], x.device, explicit=True)
        tensors = {"x": x, "noise": noise, **{k: v for k, v in conditioning.items() if v is not None}}
        kinds = ((name, value.shape, value.dtype) for name, value in tensors.items())
        key = (x.device, order.counts, _autocast(x.device.type), *kinds)
        replay = self._graphs.get(key)
        if replay is None:
            replay = self._graphs[key] = self._captured(tensors, order)
            if len(self._graphs) > self.max_graphs:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return replay(tensors, order)

    def _captured(self, tensors: dict[str, Tensor], order: StageOrder) -> _Replay:
        device = order.order.device

        def run() -> Tensor:
            return self.network(tensors["x"], tensors["noise"], order, **others)

        # Tensors made in inference mode could not be written to by calls outside of it.
        with torch.inference_mode(False), torch.no_grad():
            tensors = {name: value.clone() for name, value in tensors.items()}
            order = StageOrder(order.counts, order.order.clone(), order.inverse.clone())
            others = {name: value for name, value in tensors.items() if name not in ("x", "noise")}
            graph, output, self._pools[device] = _capture(run, device, self._pools.get(device))
        return _Replay(graph, tensors, order, output)


@dataclass
class _Replay:
    """A captured call.

    Attributes:
        graph: does the call again.
        tensors, order: what it reads.
        output: what it writes.
    """

    graph: Callable[[], None]
    tensors: dict[str, Tensor]
    order: StageOrder
    output: Tensor

    def __call__(self, tensors: dict[str, Tensor], order: StageOrder) -> Tensor:
        for name, value in tensors.items():
            self.tensors[name].copy_(value)
        self.order.copy_(order)
        self.graph()
        return self.output.clone()


def _capture(
    run: Callable[[], Tensor], device: torch.device, pool
) -> tuple[Callable[[], None], Tensor, object]:
    """A graph of ``run``, its output, and the memory pool that the device's next graph may share."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):  # its default stream is that of one device
            output = run()
    return graph.replay, output, pool or graph.pool()


def _serves(x: Tensor) -> bool:
    return x.is_cuda and not torch.cuda.is_current_stream_capturing() and not torch.compiler.is_compiling()


def _autocast(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
