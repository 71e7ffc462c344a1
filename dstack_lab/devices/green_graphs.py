"""CUDA graphs by network, batch and place: changing a share is choosing another graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Eager runs before a capture: libraries choose kernels and make workspaces in the first ones.
WARM_RUNS = 3

#: Network, batch and positions of the groups.
Key = tuple[str, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A graph with the tensors it reads and writes."""

    graph: Any
    inputs: tuple[Any, ...]
    output: Any

    def replay(self, inputs: Sequence[Any]) -> Any:
        """Run the graph on `inputs` on the current stream; the answer is overwritten by the next replay.

        The SMs are those of the stream it was captured on, whatever the current one is.
        """
        for static, fresh in zip(self.inputs, inputs, strict=True):
            static.copy_(fresh, non_blocking=True)
        self.graph.replay()
        return self.output


@dataclass(slots=True, eq=False)
class GraphPool:
    """Graphs of one tenant, of which one runs at a time: those of one place share their working memory.

    Another tenant of the same network and share has a pool, inputs and answers of its own: both may run at once.

    Memory belongs to the stream that it was made on, so that places do not share. Capture all graphs
    before serving starts, one at a time in a process: a capture waits for the whole GPU and empties
    torch's caches.

    Parameters
    ----------
    torch : module
    """

    torch: Any
    _graphs: dict[Key, Captured] = field(default_factory=dict)
    _memory: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def capture(self, key: Key, function: Callable[..., Any], inputs: Sequence[Any], stream: Any) -> Captured:
        """Capture ``function(*inputs)`` on `stream`, whose SMs every replay then uses; once for a key.

        Parameters
        ----------
        key : tuple
            Network, batch and groups.
        function : callable
            From tensors to the answer, without synchronising.
        inputs : sequence of tensor
            Examples; copied.
        stream : torch.cuda.Stream
            Of these groups, and nobody else's meanwhile. Without it torch would capture on one that has all SMs.
        """
        if key in self._graphs:
            return self._graphs[key]
        torch = self.torch
        if key[2] not in self._memory:
            self._memory[key[2]] = torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            static = tuple(tensor.clone() for tensor in inputs)
            for _ in range(WARM_RUNS):
                function(*static)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory[key[2]], stream=stream, capture_error_mode="thread_local"):
                output = function(*static)
        self._graphs[key] = Captured(graph, static, output)
        return self._graphs[key]

    def get(self, key: Key) -> Captured | None:
        """Return the graph of a key; None if it was not captured."""
        return self._graphs.get(key)

    def __len__(self) -> int:
        return len(self._graphs)
