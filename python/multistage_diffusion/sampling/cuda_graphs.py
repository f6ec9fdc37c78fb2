"""Networks in inference and training steps, replayed from CUDA graphs.

A decoder is over a hundred launches, each of which costs the host more time than a small batch costs the GPU. A graph
launches them all at once. It is captured for given shapes and counts of the stages; which sample belongs to which stage
is an input.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multistage_diffusion.networks.stage_network import Takes
from multistage_diffusion.networks.stage_order import StageOrder

__all__ = ["GraphedFunction", "GraphedNetwork"]

WARM_UPS = 3  # calls before a capture: they compile, choose algorithms and allocate

Function = Callable[[dict[str, Tensor], StageOrder], Tensor]


class GraphedFunction:
    """Calls a function through CUDA graphs where its tensors are on a GPU.

    One graph is captured for every kind of call: shapes and dtypes of the tensors, samples of each stage, autocast's
    dtype, whether gradients are enabled, the device. The graphs share their activations' memory: call it from one
    thread and one stream at a time.

    Example::

        def step(tensors, order):
            loss = (network(tensors["x"], tensors["noise"], order) - tensors["target"]).square().mean()
            loss.backward()
            return loss.detach()

        gradients = FlatGradients(network)
        graphed = GraphedFunction(step, adds_to=[gradients.values])
        ...
        loss = graphed({"x": x, "noise": noise, "target": target}, order)
        gradients.leave_absent(order.counts)
        optimizer.step()
        gradients.clear()

    Args:
        function: takes tensors by name and the order of the samples, and returns a tensor. All else that it reads or
            writes must stay where it is in memory, and it must not wait for the device.
        adds_to: tensors that it adds to, such as gradients; the calls before a capture leave them as they were, and
            PyTorch's random generators, too.
        max_graphs: the graphs that are kept.
        replace: what the next kind of call does then: takes the place of the graph that was not used for longest, or
            goes without a graph.

    Raises:
        ValueError: ``max_graphs`` below 1.
    """

    def __init__(
        self,
        function: Function,
        *,
        adds_to: Sequence[Tensor] = (),
        max_graphs: int = 64,
        replace: bool = True,
    ) -> None:
        if max_graphs < 1:
            raise ValueError(f"{type(self).__name__}: max_graphs={max_graphs} must be at least 1")
        self.function, self.adds_to, self.max_graphs, self.replace = function, adds_to, max_graphs, replace
        self._graphs: OrderedDict[tuple, _Replay] = OrderedDict()
        self._places: dict[torch.device, _Place] = {}

    def __len__(self) -> int:
        """Graphs so far."""
        return len(self._graphs)

    def __call__(self, tensors: dict[str, Tensor], order: StageOrder) -> Tensor:
        """As the function, but without a graph of autograd: the function itself must call ``backward``.

        The result is a tensor of its own, which the next call leaves alone.
        """
        x = next(iter(tensors.values()))
        kinds = ((name, value.shape, value.dtype) for name, value in tensors.items())
        modes = _autocast(x.device.type), torch.is_grad_enabled()
        key = (x.device, order.counts, order.order is None, *modes, *kinds)
        replay = self._graphs.get(key)
        if replay is None:
            full = len(self._graphs) >= self.max_graphs
            if not serves(x) or (full and not self.replace):
                return self.function(tensors, order).detach()
            replay = self._graphs[key] = self._captured(tensors, order)
            if full:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return replay(tensors, order)

    def _captured(self, tensors: dict[str, Tensor], order: StageOrder) -> _Replay:
        device = next(iter(tensors.values())).device
        place = self._places.setdefault(device, _Place(device))
        gradients = torch.is_grad_enabled()

        def run() -> Tensor:
            return self.function(tensors, order)

        # Tensors made in inference mode could not be written to by calls outside of it, whose end enables gradients.
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            tensors = {name: value.detach().clone() for name, value in tensors.items()}
            order = order.clone()
            graph, output = _capture(run, place, self.adds_to)
        return _Replay(graph, tensors, order, output.detach())


class GraphedNetwork(nn.Module):
    """Calls a network through CUDA graphs where it can: on a GPU, in eval mode, without gradients.

    Graphs are captured as :class:`GraphedFunction` says. Weights may change between calls in place; moving them drops
    the graphs. All other calls go to the network itself, whose attributes are this one's, too.

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
        if not Takes.of(network).stage_order:
            raise TypeError(f"GraphedNetwork: needs a StageNetwork, got {type(network).__name__}")
        self.network, self.max_graphs = network, max_graphs
        self._forget()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def __getstate__(self) -> dict:
        """Without the graphs, which can be neither copied nor written to a file."""
        return {name: value for name, value in self.__dict__.items() if name != "_graphs"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()

    def _apply(self, fn, recurse: bool = True):
        """Where parameters go to another place, the graphs would go on reading the old one."""
        self._forget()
        return super()._apply(fn, recurse)

    def _forget(self) -> None:
        self._graphs = GraphedFunction(self._evaluate, max_graphs=self.max_graphs)

    @torch.no_grad()
    def _evaluate(self, tensors: dict[str, Tensor], order: StageOrder) -> Tensor:
        conditioning = {name: value for name, value in tensors.items() if name not in ("x", "noise")}
        return self.network(tensors["x"], tensors["noise"], order, **conditioning)

    def forward(self, x: Tensor, noise: Tensor, stage, **conditioning: Tensor | None) -> Tensor:
        """As the network. The result is a tensor of its own, which the next call leaves alone."""
        if not serves(x) or torch.is_grad_enabled() or self.network.training:
            return self.network(x, noise, stage, **conditioning)
        order = StageOrder.of(stage, self.network.num_stages, x.shape[0], x.device, explicit=True)
        tensors = {"x": x, "noise": noise, **{k: v for k, v in conditioning.items() if v is not None}}
        return self._graphs(tensors, order)


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
        if order.order is not None:
            self.order.copy_(order)
        self.graph()
        return self.output.clone()


@dataclass
class _Place:
    """Where the graphs of a device are captured. They share their memory, which a pool lends to one stream alone.

    Attributes:
        stream: on which the captured calls run; None, as the pool, until the first graph.
    """

    device: torch.device
    stream: torch.cuda.Stream | None = None
    pool: object = None


def _capture(
    run: Callable[[], Tensor], place: _Place, adds_to: Sequence[Tensor]
) -> tuple[Callable[[], None], Tensor]:
    """A graph of ``run``, and its output."""
    with torch.cuda.device(place.device), torch.random.fork_rng([place.device]):
        place.stream = place.stream or torch.cuda.Stream()
        before = [tensor.clone() for tensor in adds_to]
        place.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(place.stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(place.stream)
        for tensor, value in zip(adds_to, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread may go on with calls that a capture forbids.
        with torch.cuda.graph(graph, pool=place.pool, stream=place.stream, capture_error_mode="thread_local"):
            output = run()
        place.pool = place.pool or graph.pool()
    return graph.replay, output


def serves(x: Tensor) -> bool:
    """Whether a call on ``x`` can be captured."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing() and not torch.compiler.is_compiling()


def _autocast(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
