"""Microseconds of a layer as CUDA graph replays, beside cuBLAS's product alone.

    python measure.py libplain.so [--variants] [--kernels]

8 layers 4096 x 4096 in a chain (so that no weight is still in the L2 cache), rank 16, float16,
adapters drawn uniformly; the median of 7 runs of replays. The routes are made outside, as once a
run of a model; the last column is what they take.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from plain import Choice, Kernels, Site

LAYERS, SIZE = 8, 4096
MIXED = (8, 8, 16, 16, 32, 32, 64, 128)
CELLS = [(8, 8), (8, 64), (8, 512), (8, 4096), (32, 64), (128, 128), (128, 8192)]


def replayed(work: Callable[[], object]) -> float:
    """Microseconds of one replay of what `work` queues, median."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    times = []
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    torch.cuda.synchronize()
    count = 10
    for _ in range(8):
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / count)
        count = max(4, min(200, int(20000 / times[-1])))
    return statistics.median(times[1:])


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float16) / shape[-1] ** 0.5


class Cell:
    def __init__(
        self,
        kernels: Kernels,
        adapters: int,
        tokens: int,
        width: int = 16,
        slots: int = 0,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.kernels = kernels
        slots = slots or adapters
        chosen = torch.randint(1, adapters + 1, (tokens,), device="cuda")
        self.chosen = chosen
        self.x = torch.randn(tokens, SIZE, device="cuda", dtype=torch.float16)
        self.weights = [values(SIZE, SIZE) for _ in range(LAYERS)]
        self.sites = [
            Site(
                slots,
                chosen,
                self.x,
                values(slots * width, SIZE),
                [values(slots * width, SIZE)],
                [w],
                ranks=None if ranks is None else torch.tensor(ranks, device="cuda"),
            )
            for w in self.weights
        ]
        routes = kernels.route(chosen)
        for before, site in zip([None, *self.sites], self.sites, strict=False):
            site.routes = routes
            site.ys = [torch.empty_like(self.x)]
            site.x = before.ys[0] if before else self.x

    def base(self, transposed: bool) -> float:
        weights = self.weights
        if transposed:
            weights = [w.t().contiguous().t() for w in weights]

        def work() -> None:
            x = self.x
            for weight, site in zip(weights, self.sites, strict=True):
                torch.mm(x, weight, out=site.ys[0])
                x = site.ys[0]

        return replayed(work) / LAYERS

    def ours(self, choice: Choice | None = None) -> float:
        return (
            replayed(lambda: [self.kernels.compute(site, choice) for site in self.sites]) / LAYERS
        )

    def added(self) -> float:
        """The LoRA part alone, beside a base that is there: its y are inputs."""
        beside = {"weights": (), "bases": [self.x], "biases": (), "scratch": None}
        sites = [replace(site, x=self.x, **beside) for site in self.sites]
        return replayed(lambda: [self.kernels.compute(site) for site in sites]) / LAYERS

    def by_kernel(self) -> list[str]:
        """Microseconds of each kernel by the profiler, without a graph."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(5):
                for site in self.sites:
                    self.kernels.compute(site)
            torch.cuda.synchronize()
        found = sorted(profile.key_averages(), key=lambda one: -one.device_time_total)
        return [f"{one.device_time:7.1f} {one.key[:90]}" for one in found[:4]]

    def routed(self) -> float:
        return replayed(lambda: [self.kernels.route(self.chosen) for _ in range(4)]) / 4


def variants(tokens: int) -> Sequence[tuple[int, int, int, int]]:
    """Shrink tile, expand tile, splits, order."""
    if tokens <= 1024:
        found = [(0, 0, splits, 1) for splits in (4, 8, 16)]
        return [*found, (32, 0, 8, 1), (32, 0, 4, 1), (0, 64, 0, 1), (0, 0, 0, 2), (0, 0, 0, 3)]
    found = [(shrink, 64, splits, 1) for shrink in (16, 32) for splits in (1, 2, 4)]
    return [*found, (0, 16, 1, 1), (0, 16, 2, 1), (0, 0, 0, 2), (0, 0, 0, 3)]


def main() -> None:
    torch.manual_seed(0)
    kernels = Kernels(sys.argv[1])
    print(torch.cuda.get_device_name(), torch.__version__)
    print("adapters tokens | base [out, in], [in, out] | ours, over the faster | alone | routes")
    for adapters, tokens in CELLS:
        cell = Cell(kernels, adapters, tokens)
        bases = cell.base(True), cell.base(False)
        ours = cell.ours()
        print(
            f"{adapters:4} {tokens:6} | {bases[0]:6.1f} {bases[1]:6.1f} | {ours:6.1f}"
            f" {ours / min(bases):5.2f} | {cell.added():6.1f} | {cell.routed():5.1f}",
            flush=True,
        )
        if "--variants" in sys.argv:
            for one in variants(tokens):
                print(f"        {one} {cell.ours(Choice(*one)):6.1f}", flush=True)
        if "--kernels" in sys.argv:
            print("\n".join(cell.by_kernel()), flush=True)
        del cell
    for tokens in (64, 4096):
        for slots in (8, 256):
            cell = Cell(kernels, 8, tokens, slots=slots)
            print(f"8 adapters in {slots} slots, {tokens} tokens: {cell.ours():.1f}", flush=True)
        cell = Cell(kernels, 8, tokens, width=128)
        print(f"8 adapters of rank 128, {tokens} tokens: {cell.ours():.1f}", flush=True)
        cell = Cell(kernels, 8, tokens, width=128, ranks=MIXED)
        print(f"8 adapters of ranks 8 to 128, {tokens} tokens: {cell.ours():.1f}", flush=True)


if __name__ == "__main__":
    main()
