"""Hold the CUDA kernels to float64 over random shapes; any difference is an error.

python check.py libplain.so [--quick]
"""

import itertools
import random
import sys
from collections.abc import Iterable

import torch
from plain import ORDERS, ROUNDING, Choice, Kernels, Site
from torch import Tensor


def make_site(
    kernels: Kernels,
    dtype: torch.dtype,
    rows: int,
    per_row: int,
    num_slots: int,
    width: int,
    in_features: int,
    outs: list[int],
    bias: bool,
    add: bool,
    used: int | None = None,
) -> Site:
    def values(*shape: int) -> Tensor:
        return torch.randn(shape, device=kernels.device).to(dtype)

    tokens, stack = rows * per_row, num_slots * width
    slots = torch.randint(-1, (used or num_slots) + 2, (rows,), device=kernels.device)
    return Site(
        num_slots,
        slots,
        values(tokens, in_features),
        values(stack, in_features),
        values(stack, sum(outs)).split(outs, dim=1) if add else [values(stack, n) for n in outs],
        [] if add else [values(in_features, out) for out in outs],
        [values(tokens, out) for out in outs] if add else [],
        [values(out) for out in outs] if bias else [],
        random_ranks(kernels, num_slots, width),
    )


def random_ranks(kernels: Kernels, num_slots: int, width: int) -> Tensor:
    """Of every size, those that a slot has no rows for included."""
    some = torch.tensor([0, 1, 8, width // 2, width - 1, width, width, width + 8, -1])
    draw = torch.randint(len(some), (num_slots,))
    return some[draw].to(kernels.device)


def worst(kernels: Kernels, site: Site, choice: Choice) -> float:
    site.ys, site.scratch = [], None
    ys = kernels.compute(site, choice)
    most = 0.0
    for y, (expected, allowed) in zip(ys, site.reference(), strict=True):
        if not torch.isfinite(y).all():
            return float("inf")
        off = (y.double() - expected).abs() / allowed
        most = max(most, off.max().item() if off.numel() else 0.0)
    return most


def check_values(kernels: Kernels, count: int, most_tokens: int) -> None:
    draw = random.Random(1)
    fixed = [
        (torch.float16, 8, 1, 8, 16, 4096, [4096], False, False),
        (torch.bfloat16, 64, 1, 8, 16, 1024, [1024, 512, 512], True, False),
        (torch.float16, 300, 1, 40, 8, 512, [520], False, True),
        (torch.float16, 4, 33, 3, 48, 256, [512], False, True),
    ]
    for number in range(count):
        if number < len(fixed):
            shape = fixed[number]
        else:
            per_row = draw.choice([1, 1, 1, 2, 5, 16, 17, 33, 64, 70])
            rows = max(1, draw.randint(1, most_tokens) // per_row)
            add = draw.random() < 0.4
            outs = [
                draw.choice([1, 7, 8, 24, 64, 72, 256, 264, 520]) for _ in range(draw.randint(1, 3))
            ]
            shape = (
                draw.choice([torch.float16, torch.bfloat16]),
                rows,
                per_row,
                draw.choice([1, 2, 3, 8, 40]),
                draw.choice([1, 7, 8, 16, 20, 24, 32, 48, 64, 100, 192]),
                draw.choice([1, 8, 31, 32, 40, 256, 264, 512, 1000]),
                outs,
                not add and draw.random() < 0.5,
                add,
            )
        site = make_site(kernels, *shape)
        for order in ["base first"] if shape[-1] else ORDERS:
            choice = Choice(
                draw.choice([0, 16, 32, 64]),
                draw.choice([0, 16, 32, 64]),
                draw.choice([0, 1, 2, 8]),
                ORDERS[order],
            )
            off = worst(kernels, site, choice)
            said = tuple(getattr(choice, name) for name, *_ in Choice._fields_)
            assert off <= 1, f"off by {off} of what is allowed: {shape}, {order}, {said}"


def check_alone(kernels: Kernels, rows: int = 40, dtypes: Iterable[torch.dtype] = ROUNDING) -> None:
    """A row's bits depend on nothing of another row, nor of rows beyond its adapter's rank."""
    for dtype, per_row, order, tile in itertools.product(
        dtypes, (1, 3), ORDERS.values(), (0, 32, 64)
    ):
        slots_of, width = 6, 24
        for add in (False, True):
            site = make_site(
                kernels, dtype, rows, per_row, slots_of, width, 264, [264], not add, add
            )
            own_rank = 7 if add else 16
            site.slots[5], site.ranks[1] = 2, own_rank
            tokens = slice(5 * per_row, 6 * per_row)
            choice = Choice(tile, tile, 0, order)
            alone = kernels.compute(site, choice)[0][tokens].clone()
            others = torch.ones(rows * per_row, dtype=torch.bool, device=kernels.device)
            others[tokens] = False
            foreign = torch.ones(slots_of * width, dtype=torch.bool, device=kernels.device)
            foreign[width : width + own_rank] = False
            for bad in (float("inf"), float("nan"), 2.0):
                site.x[others], site.a[foreign], site.bs[0][foreign] = bad, bad, bad
                site.slots = torch.randint(-1, slots_of + 2, (rows,), device=kernels.device)
                site.slots[5], site.routes, site.scratch = 2, None, None
                site.ranks = random_ranks(kernels, slots_of, width)
                site.ranks[1] = own_rank
                again = kernels.compute(site, choice)[0][tokens]
                assert torch.equal(again, alone), (dtype, per_row, order, tile, add, bad)


def check_routes(
    kernels: Kernels, sizes: list[int], mosts: Iterable[int] = (1, 8, 300, 1500, 70000)
) -> None:
    """The device's routes are those of the plain loops, and the same every time."""
    for rows in sizes:
        for most in mosts:
            slots = torch.randint(-2, most, (rows,))
            slots[0] = 2**40
            ours, plain = (
                read_routes(kernels.route(slots.to(kernels.device))),
                read_routes(kernels.route_cpu(slots)),
            )
            for one, other in zip(ours, plain, strict=True):
                assert torch.equal(one.cpu(), other), (rows, most)


def read_routes(routes: Tensor) -> list[Tensor]:
    """What csrc/routes.h says: number of tiles, runs of 32 and 64, rows, slots, slots of 16."""
    count = len(routes) - 1
    words = routes.flatten().view(torch.int32)
    tiles, *parts, _ = words.split(
        [4, 4 * count, 4 * count, 16 * count, 2 * count, count, 24 + count]
    )
    parts[2] = parts[2][: 16 * int(tiles[0])]
    return [tiles, *parts]


def main() -> None:
    torch.manual_seed(0)
    kernels = Kernels(sys.argv[1], "cpu" if "--cpu" in sys.argv else "cuda")
    quick = "--quick" in sys.argv
    check_routes(kernels, [1, 100, 129, 700] if quick else [1, 2, 100, 128, 129, 700, 5000, 70000])
    check_values(kernels, 12 if quick else 300, 100 if quick else 3000)
    if not quick:
        check_alone(kernels)
    print("all right")


if __name__ == "__main__":
    main()
