"""The CUDA kernels by ctypes and torch, without onnxruntime: csrc/ compiled with bench/plain.cc.

LORAEXPORT_KERNELS_PLAIN=1 LORAEXPORT_KERNELS_ARCHS=90 python compile_kernels.py libplain.so
"""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROUTE_WORDS = 14
ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class CSlice(ctypes.Structure):
    _fields_ = [
        ("out", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "base", "b")),
        ("b_stride", ctypes.c_int64),
        ("y", ctypes.c_void_p),
    ]


class CSite(ctypes.Structure):
    _fields_ = [
        ("element", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "in_", "slots", "width")),
        *((name, ctypes.c_void_p) for name in ("x", "a", "routes", "ranks")),
        ("num_slices", ctypes.c_int),
        ("slices", CSlice * 3),
    ]


class Choice(ctypes.Structure):
    """Zeros are chosen by the library."""

    _fields_ = [(name, ctypes.c_int) for name in ("shrink_tile", "expand_tile", "splits", "order")]


ORDERS = {"base first": 1, "shrink first": 2, "base last": 3}


def load(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(os.path.abspath(path))
    library.plain_route.restype = library.plain_compute.restype = ctypes.c_char_p
    library.plain_choose.restype = ctypes.c_int64
    return library


def _stream(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if tensor.is_cuda else None)


@dataclass
class Site:
    """One call. weights [in, out] (or none, then bases [T, out]), biases [out], bs [S * W, out].

    ranks [S] of W rows each: those of a slot that are in use; none: all are.
    """

    num_slots: int
    slots: Tensor
    x: Tensor
    a: Tensor
    bs: Sequence[Tensor]
    weights: Sequence[Tensor] = ()
    bases: Sequence[Tensor] = ()
    biases: Sequence[Tensor] = ()
    ranks: Tensor | None = None
    ys: list[Tensor] = field(default_factory=list)
    scratch: Tensor | None = None
    routes: Tensor | None = None

    @property
    def width(self) -> int:
        return self.a.shape[0] // self.num_slots

    def rank(self, slot: int) -> int:
        if self.ranks is None:
            return self.width
        return min(max(0, int(self.ranks[slot - 1])), self.width)

    def reference(self) -> list[tuple[Tensor, Tensor]]:
        """y of each slice in float64, and what it may be off.

        That is roundings of h, of h B and of y to the element type, and float32 sums.
        """
        x, a = self.x.double(), self.a.double()
        slots = self.slots.repeat_interleave(len(x) // max(1, len(self.slots)))
        part = ROUNDING[self.x.dtype]
        found = []
        for index, b in enumerate(self.bs):
            if self.weights:
                weight = self.weights[index].double()
                y, sums = x @ weight, x.abs() @ weight.abs()
            else:
                y = self.bases[index].double()
                sums = y.abs()
            rounded = y.abs()
            if self.biases:
                y = y + self.biases[index].double()
                rounded = rounded + self.biases[index].double().abs()
            for slot in set(slots.tolist()) & set(range(1, self.num_slots + 1)):
                first = (slot - 1) * self.width
                own = slice(first, first + self.rank(slot))
                rows, b_own = slots == slot, b[own].double()
                h = x[rows] @ a[own].T
                y[rows] += h @ b_own
                rounded[rows] += h.abs() @ b_own.abs()
                sums[rows] += x[rows].abs() @ a[own].abs().T @ b_own.abs()
            found.append((y, 3 * part * rounded + 2**-19 * sums + 1e-6))
        return found


class Kernels:
    def __init__(self, path: str, device: str = "cuda") -> None:
        self.library = load(path)
        self.device = device

    def route(self, slots: Tensor) -> Tensor:
        routes = slots.new_empty(len(slots) + 1, ROUTE_WORDS)
        self._check(
            self.library.plain_route(
                ctypes.c_void_p(slots.data_ptr()),
                ctypes.c_int64(len(slots)),
                ctypes.c_void_p(routes.data_ptr()),
                _stream(slots),
            )
        )
        return routes

    def route_cpu(self, slots: Tensor) -> Tensor:
        routes = torch.empty(len(slots) + 1, ROUTE_WORDS, dtype=torch.int64)
        self.library.plain_route_cpu(
            ctypes.c_void_p(slots.data_ptr()),
            ctypes.c_int64(len(slots)),
            ctypes.c_void_p(routes.data_ptr()),
        )
        return routes

    def compute(self, site: Site, choice: Choice | None = None) -> list[Tensor]:
        """y of each slice, in the site's own memory; allocates on the first call alone."""
        if not site.ys:
            nan = float("nan")
            site.ys = [site.x.new_full((len(site.x), b.shape[1]), nan) for b in site.bs]
        if site.routes is None:
            site.routes = self.route(site.slots)
        if site.ranks is None:
            site.ranks = site.slots.new_full((site.num_slots,), site.width)
        c = self._c_site(site)
        choice = choice or Choice()
        chosen = Choice(*(getattr(choice, name) for name, *_ in Choice._fields_))
        size = self.library.plain_choose(ctypes.byref(c), ctypes.byref(chosen)) // 4
        if site.scratch is None or site.scratch.numel() < size:
            site.scratch = site.x.new_full((size,), float("nan"), dtype=torch.float32)
        self._check(
            self.library.plain_compute(
                ctypes.byref(c),
                ctypes.byref(chosen),
                _stream(site.x),
                ctypes.c_void_p(torch.cuda.current_blas_handle() if site.x.is_cuda else None),
                ctypes.c_void_p(site.scratch.data_ptr()),
            )
        )
        return site.ys

    def _c_site(self, site: Site) -> CSite:
        c = CSite()
        c.element = ELEMENTS[site.x.dtype]
        c.tokens, c.in_ = site.x.shape
        c.rows, c.slots, c.width = len(site.slots), site.num_slots, site.width
        given = site.x, site.a, site.routes, site.ranks
        c.x, c.a, c.routes, c.ranks = (t.data_ptr() for t in given if t is not None)
        c.num_slices = len(site.bs)
        for index, b in enumerate(site.bs):
            s = c.slices[index]
            s.out, s.b, s.b_stride = b.shape[1], b.data_ptr(), b.stride(0)
            s.y = site.ys[index].data_ptr()
            if site.weights:
                s.weight = site.weights[index].data_ptr()
            else:
                s.base = site.bases[index].data_ptr()
            if site.biases:
                s.bias = site.biases[index].data_ptr()
        return c

    @staticmethod
    def _check(failed: Any) -> None:
        if failed:
            raise RuntimeError(failed.decode())
