"""The ops on a CPU are what their formula says; a row depends on nothing of another row."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import (
    TYPES,
    Graph,
    Site,
    assert_right,
    integers_of,
    make_model,
    random_site,
)

SHAPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "dtype": st.sampled_from(list(TYPES)),
        "rows": st.integers(0, 70),
        "per_row": st.integers(1, 5),
        "num_slots": st.integers(1, 9),
        "width": st.integers(1, 24),
        "in_features": st.integers(1, 40),
    }
)


RANKS = st.lists(st.integers(-1, 26), min_size=9, max_size=9)
"""Of the first slots; negative numbers are 0, larger ones all rows of the slot."""


@given(
    shapes=SHAPES,
    ranks=RANKS,
    outs=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_lora_linear(
    library: Path, shapes: dict[str, int], ranks: list[int], outs: list[int], bias: bool
) -> None:
    site = random_site(**shapes, ranks=ranks[: shapes["num_slots"]], outs=outs, bias=bias)
    assert_right(site, Graph(site, library).run(site))


@given(shapes=SHAPES, ranks=RANKS, outs=st.lists(st.integers(1, 40), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_lora_add(library: Path, shapes: dict[str, int], ranks: list[int], outs: list[int]) -> None:
    site = random_site(**shapes, ranks=ranks[: shapes["num_slots"]], outs=outs, add=True)
    assert_right(site, Graph(site, library).run(site))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("add", [False, True])
def test_a_row_stands_alone(library: Path, dtype: str, add: bool) -> None:
    """Bit for bit the same, whatever slots the others use and whatever they hold, inf included;
    and whatever lies beyond the adapter's rank."""
    ranks = [8, 5, 0, 3]
    site = random_site(5, dtype=dtype, rows=6, per_row=2, num_slots=4, ranks=ranks, add=add)
    site = site.changed(slots=np.array([1, 2, 3, 4, 0, 2]))
    graph = Graph(site, library)
    row, tokens, own = 1, slice(2, 4), site.rows(2)
    alone = graph.run(site)[0][tokens]
    others = np.ones(len(site.x), bool)
    others[tokens] = False
    foreign = np.ones(len(site.a), bool)
    foreign[own] = False
    draw = np.random.default_rng(1)
    for bad in (np.inf, -np.inf, np.nan, 3.0):
        x, a, b = site.x.copy(), site.a.copy(), site.bs[0].copy()
        x[others] = a[foreign] = b[foreign] = bad
        slots = draw.integers(0, 5, 6)
        slots[row] = site.slots[row]
        others_ranks = draw.integers(0, 9, 4)
        others_ranks[1] = 5
        changed = site.changed(x=x, a=a, bs=[b], slots=slots, ranks=others_ranks)
        assert np.array_equal(graph.run(changed)[0][tokens], alone)


@pytest.mark.parametrize("add", [False, True])
def test_mixed_ranks(library: Path, add: bool) -> None:
    """Adapters of rank 8 to 128 beside each other, and one that has nothing at this site."""
    ranks = [8, 16, 128, 0, 64, 24, 100, 32]
    site = random_site(
        10, rows=40, num_slots=8, width=128, in_features=48, outs=(24,), ranks=ranks, add=add
    )
    graph = Graph(site, library)
    ys = graph.run(site)
    assert_right(site, ys)
    nothing = site.slots == 4
    assert nothing.any()
    base = graph.run(site.changed(slots=np.zeros(40)))
    assert np.array_equal(ys[0][nothing], base[0][nothing])


def test_own_values_arrive(library: Path) -> None:
    """An adapter that overflows does so in its own rows."""
    site = random_site(6, dtype="float16", rows=3)
    site = site.changed(slots=np.array([1, 2, 0]), a=np.full_like(site.a, 60000.0))
    site = site.changed(x=abs(site.x))
    y = Graph(site, library).run(site)[0]
    assert not np.isfinite(y[:2]).any()
    assert np.isfinite(y[2]).all()


def test_base_rows_are_the_base(library: Path) -> None:
    """Slot 0 and numbers that name no slot give the same bits."""
    site = random_site(7, rows=5, outs=(8, 12), bias=True)
    graph = Graph(site, library)
    base = graph.run(site.changed(slots=np.zeros(5, np.int64)))
    numbers = np.array([-1, 4, 65536, 2**40, -(2**63)])
    for y, same in zip(base, graph.run(site.changed(slots=numbers)), strict=True):
        assert np.array_equal(y, same)


def test_batches_of_rows(library: Path) -> None:
    """x may have more dimensions: y has the same, with its own width."""
    site = random_site(8, rows=3, per_row=4)
    model = make_model(site)
    (x,) = [value for value in model.graph.input if value.name == "x"]
    dims = x.type.tensor_type.shape.dim
    dims[0].dim_param = "rows"
    dims.insert(1, type(dims[0])(dim_param="n"))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {"x": site.x.reshape(3, 4, -1), "a": site.a}
    feeds["wb1"] = np.concatenate([site.weights[0], site.bs[0]])
    feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
    feeds |= {name: value.astype(np.int64) for name, value in integers_of(site).items()}
    y = session.run(None, feeds)[0]
    assert y.shape == (3, 4, 16)
    assert_right(site, [y.reshape(12, 16)])


def test_shapes_are_inferred(library: Path, tmp_path: Path) -> None:
    """What follows an op knows its shape, a name of a dimension included."""
    site = random_site(9, outs=(8, 12))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        make_model(site).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    assert [output.shape for output in session.get_outputs()] == [["tokens", 8], ["tokens", 12]]


def wrong(site: Site, **attributes: int) -> bytes:
    model = make_model(site)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in attributes:
                attribute.i = attributes[attribute.name]
    serialized: bytes = model.SerializeToString()
    return serialized


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"num_slots": 0}, "LoraLinear: num_slots must be 1 to 65535"),
        ({"num_slots": 65536}, "LoraLinear: num_slots must be 1 to 65535"),
        ({"rows_per_slot": 0}, "LoraLinear: rows_per_slot must be 1 or more"),
        ({"bias_rows": 1}, "LoraLinear: bias_rows must be 0 or 8"),
    ],
)
def test_wrong_attributes_are_refused(library: Path, attributes: dict[str, int], said: str) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    with pytest.raises(Exception, match=said):
        onnxruntime.InferenceSession(
            wrong(random_site(1), **attributes), options, providers=["CPUExecutionProvider"]
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"a": np.zeros((8, 16))}, r"LoraLinear: A must be \[K', in\]"),
        ({"bs": [np.zeros((8, 16))]}, r"LoraLinear: WB must be \[in \+ K', out\]"),
        ({"x": np.zeros((5, 16))}, "LoraLinear: the rows of x must be a multiple"),
        ({"ranks": np.zeros(2)}, r"LoraLinear: ranks must be \[S, 1\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    library: Path, changes: dict[str, object], said: str
) -> None:
    site = random_site(1)
    model = make_model(site)
    for value in model.graph.input[1:]:
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_param = "any"
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    graph = Graph(site, library)
    graph.session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    with pytest.raises(Exception, match=said):
        graph.run(site.changed(**changes))
