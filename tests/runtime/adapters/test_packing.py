"""One adapter's rows of a layer's stacks, held to its formula; what does not fit is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.adapters import write_adapter

from loraexport_runtime.adapters.dora import find_base_weights, output_scale
from loraexport_runtime.adapters.fit import check_fit
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.packing import assemble, check_values, lowest, pack
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.adapters.tensor_files import digest_array
from loraexport_runtime.adapters.tensors import LoraWeights, SavedWeights
from loraexport_runtime.contract.manifest import Layer, Slice, Stack
from loraexport_runtime.contract.naming import NO_NAMING
from loraexport_runtime.errors import AdapterConfigError, AdapterWeightsError, WeightsError

SIZE_IN, MAX_RANK, SLOTS = 5, 3, 2
FLOAT32 = np.dtype(np.float32)
LORA = ("lora_A", "lora_B")


def make_layer(*roles: str, widths: tuple[int, ...] = (4,), **changes: Any) -> Layer:
    """A linear layer of slices `site0`, `site1`, …, with stacks of these roles for two slots."""
    out, rows = sum(widths), len(widths) * MAX_RANK
    # Role -> width, rows of a slot, rows of the base ahead of them.
    sizes = {
        "lora_A": (SIZE_IN, rows, 0),
        "lora_B": (out, rows, 0),
        "rank": (1, 1, 0),
        "output_scale": (out, 1, 1),
        "bias": (out, 1, 1),
        "weight": (SIZE_IN, out, out),
    }
    stacks = []
    for role in roles:
        width, per_slot, ahead = sizes[role]
        shape = (ahead + SLOTS * per_slot, width)
        stacks.append(Stack(f"layer.{role}", role, shape, per_slot, ahead, 0))  # type: ignore[arg-type]
    parts = [
        Slice(f"site{index}", f"site{index}", sum(widths[:index]), width)
        for index, width in enumerate(widths)
    ]
    made = Layer(
        "layer",
        "linear",
        SIZE_IN,
        out,
        tuple(parts),
        MAX_RANK,
        "masked",
        tuple(stacks),
        base_rows=None,
        in_base=True,
        labels=False,
        onnx=None,
        torchscript=None,
    )
    return replace(made, **changes)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def base_rows(layer: Layer, weight: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    rows = {
        "output_scale": np.ones((1, len(bias)), np.float32),
        "bias": bias[None],
        "weight": weight,
    }
    return {stack.name: rows[stack.role] for stack in layer.stacks if stack.row_offset}


def lora(out: int, rank: int = 2, **extras: np.ndarray) -> LoraWeights:
    return LoraWeights(draw(rank, SIZE_IN, seed=1), draw(out, rank, seed=2), 1.5, **extras)


# ---------------------------------------------------------------- pack


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rows_of_a_slot_compute_the_adapter(scale: float) -> None:
    """y = output_scale (W x) + bias + B^T A x is DoRA, the trained bias and lora_bias of a slice,
    plain LoRA of the next, and the base of the last."""
    widths = (4, 2, 3)
    layer = make_layer(*LORA, "output_scale", "bias", widths=widths)
    weight, bias, x = draw(9, SIZE_IN, seed=3), draw(9, seed=4), draw(SIZE_IN, seed=5)
    extras = {"magnitude": draw(4, seed=6), "lora_bias": draw(4, seed=7)}
    first = lora(4, **extras, base_bias=draw(4, seed=8))
    second = lora(2, rank=3)
    scales = {"site0": output_scale(weight[:4], first, scale)}
    rows = base_rows(layer, weight, bias)
    packed = pack(layer, {"site0": first, "site1": second}, scale, FLOAT32, rows, scales)

    factor = 1.5 * scale
    merged = weight[:4] + factor * first.b @ first.a
    merged *= (extras["magnitude"] / np.linalg.norm(merged, axis=1))[:, None]
    assert first.base_bias is not None
    expected = [
        merged @ x + first.base_bias + factor * extras["lora_bias"],
        (weight[4:6] + factor * second.b @ second.a) @ x + bias[4:6],
        weight[6:] @ x + bias[6:],
    ]
    own = {stack.role: packed[stack.name] for stack in layer.stacks}
    y = own["output_scale"][0] * (weight @ x) + own["bias"][0] + own["lora_A"] @ x @ own["lora_B"]
    np.testing.assert_allclose(y, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    assert {name: one.dtype for name, one in packed.items()} == dict.fromkeys(packed, FLOAT32)


def test_slices_lie_one_behind_the_other() -> None:
    """So that one number says how many rows of the slot are in use."""
    layer = make_layer(*LORA, "rank", widths=(4, 2, 3))
    first, last = lora(4, rank=2), lora(3, rank=1)
    packed = pack(layer, {"site0": first, "site2": last}, 1.0, FLOAT32)
    assert packed["layer.rank"].tolist() == [[3]]
    assert packed["layer.rank"].dtype == np.int64
    a, b = packed["layer.lora_A"], packed["layer.lora_B"]
    np.testing.assert_array_equal(a[:3], [*first.a, *last.a])
    assert not a[3:].any()
    assert not b[3:].any()
    x = draw(SIZE_IN, seed=3)
    expected = 1.5 * np.concatenate(
        [first.b @ first.a @ x, np.zeros(2, np.float32), last.b @ last.a @ x]
    )
    np.testing.assert_allclose(a @ x @ b, expected, rtol=1e-5, atol=1e-6)
    assert pack(layer, {}, 1.0, FLOAT32)["layer.rank"].tolist() == [[0]]


def test_the_output_scale_is_folded_into_b() -> None:
    layer = make_layer(*LORA, "output_scale")
    one = lora(4, magnitude=draw(4))
    g = draw(4, seed=9)
    rows = base_rows(layer, draw(4, SIZE_IN), draw(4))
    packed = pack(layer, {"site0": one}, 0.5, FLOAT32, rows, {"site0": g})
    np.testing.assert_allclose(packed["layer.lora_B"][:2], (one.b * g[:, None] * 0.75).T, rtol=1e-6)
    assert not packed["layer.lora_B"][2:].any(), "ranks that the adapter does not use"
    np.testing.assert_array_equal(packed["layer.output_scale"][0], g)


@pytest.mark.parametrize("roles", [(*LORA, "output_scale", "bias"), ("weight", "bias")])
def test_an_adapter_that_leaves_a_layer_alone_gives_the_bases_own_rows(
    roles: tuple[str, ...],
) -> None:
    layer = make_layer(*roles)
    rows = base_rows(layer, draw(4, SIZE_IN), draw(4))
    packed = pack(layer, {}, 1.0, FLOAT32, rows)
    for stack in layer.stacks:
        expected = rows.get(stack.name, np.zeros((stack.rows_per_slot, stack.shape[1])))
        np.testing.assert_array_equal(packed[stack.name], expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_labels_that_a_head_lacks_never_win(dtype: Any, has_bias: bool) -> None:
    """Weight 0 and the lowest bias that the dtype has; a head without a bias adds 0 to its own."""
    layer = make_layer("weight", "bias", labels=True)
    rows = base_rows(layer, draw(4, SIZE_IN), draw(4))
    head = SavedWeights(draw(3, SIZE_IN, seed=1), draw(3, seed=2) if has_bias else None)
    packed = pack(layer, {"site0": head}, 1.0, np.dtype(dtype), rows)
    weight, bias = packed["layer.weight"], packed["layer.bias"]
    np.testing.assert_array_equal(weight[:3], head.weight.astype(dtype))
    assert not weight[3:].astype(np.float32).any()
    own = np.zeros(3, dtype) if head.bias is None else head.bias.astype(dtype)
    np.testing.assert_array_equal(bias[0, :3], own)
    assert bias[0, 3] == ml_dtypes.finfo(dtype).min == lowest(np.dtype(dtype))


def test_dora_where_rows_have_whole_weights_scales_those() -> None:
    """A site that is a head of another adapter has no output_scale: g W takes its place."""
    layer = make_layer(*LORA, "weight", "bias")
    weight, bias, x = draw(4, SIZE_IN), draw(4), draw(SIZE_IN, seed=5)
    one = lora(4, magnitude=draw(4, seed=6), base_bias=draw(4, seed=7))
    g = output_scale(weight, one, 1.0)
    packed = pack(layer, {"site0": one}, 1.0, FLOAT32, base_rows(layer, weight, bias), {"site0": g})
    np.testing.assert_allclose(packed["layer.weight"], weight * g[:, None], rtol=1e-6)
    y = packed["layer.weight"] @ x + packed["layer.bias"][0]
    y = y + packed["layer.lora_A"] @ x @ packed["layer.lora_B"]
    merged = weight + 1.5 * one.b @ one.a
    assert one.magnitude is not None
    merged *= (one.magnitude / np.linalg.norm(merged, axis=1))[:, None]
    np.testing.assert_allclose(y, merged @ x + one.base_bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("role", "extras"),
    [
        ("bias", {"base_bias": np.full(4, 1e6, np.float32)}),
        ("bias", {"lora_bias": np.full(4, 6e4, np.float32)}),
        ("output_scale", {"magnitude": np.full(4, 1e6, np.float32)}),
    ],
)
def test_parameter_beyond_the_dtype(role: str, extras: dict[str, np.ndarray]) -> None:
    layer = make_layer(*LORA, "output_scale", "bias")
    one = replace(lora(4), b=np.zeros((4, 2), np.float32), **extras)
    rows = base_rows(layer, draw(4, SIZE_IN), draw(4))
    scales = {"site0": np.full(4, 1e6, np.float32)} if role == "output_scale" else {}
    with pytest.raises(AdapterWeightsError, match=f"layer 'layer': {role} overflows float16; exp"):
        pack(layer, {"site0": one}, 1.0, np.dtype(np.float16), rows, scales)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "scale", "base_bias", "lora_bias", "g"])
def test_values_beyond_the_dtype_in_an_adapter_without_slot(part: str, dtype: str) -> None:
    """Finite as they are stored; every kind of tensor."""
    large = float(np.finfo(dtype).max) * 4
    base_bias = np.full(4, large if part == "base_bias" else 1.0)
    brought = replace(
        lora(4),
        a=np.full((2, SIZE_IN), large if part == "lora_A" else 1.0),
        b=np.full((4, 2), large if part == "lora_B" else 1.0),
        base_bias=base_bias,
        lora_bias=np.full(4, large if part == "lora_bias" else 1.0),
        magnitude=np.ones(4),
    )
    scale = large if part == "scale" else 1.0
    scales = {"site0": np.full(4, large if part == "g" else 1.0)}
    role = {"scale": "lora_B", "base_bias": "bias", "lora_bias": "bias", "g": "lora_B"}
    expected = f"adapter 'sql': its {role.get(part, part)} at site 'site0' overflows {dtype}; exp"
    with pytest.raises(AdapterWeightsError, match=expected):
        check_values("sql", {"site0": brought}, scale, np.dtype(dtype), scales)
    check_values("sql", {"site0": brought}, scale, np.dtype(np.float64), scales)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_head_beyond_the_dtype(part: str) -> None:
    head = SavedWeights(draw(4, SIZE_IN), draw(4))
    head = replace(head, **{part: np.full_like(getattr(head, part), 1e6)})
    with pytest.raises(AdapterWeightsError, match=f"its {part} at site 'head' overflows float16"):
        check_values("sql", {"head": head}, 1.0, np.dtype(np.float16))


@pytest.mark.parametrize("factor", ["infinite", "not_a_number"])
def test_a_product_beyond_float64(factor: str) -> None:
    """No warning, and not NaN in a stack."""
    layer = make_layer(*LORA, "bias")
    b = np.full((4, 2), 1e300 if factor == "infinite" else 0.0)
    brought = replace(lora(4), b=b, scaling=1e300)
    scale = 1e300 if factor == "infinite" else float("inf")
    rows = base_rows(layer, draw(4, SIZE_IN), draw(4))
    with pytest.raises(AdapterWeightsError, match="lora_B overflows float32"):
        pack(layer, {"site0": brought}, scale, FLOAT32, rows)


def test_dora_beyond_float64() -> None:
    """The norm would be inf, and g zero: other numbers, in silence."""
    brought = replace(lora(4), b=np.full((4, 2), 1e200), magnitude=np.ones(4))
    with pytest.raises(WeightsError, match=r"W \+ scaling B A is not finite.* lower the scale"):
        output_scale(draw(4, SIZE_IN), brought, 1e90)


def test_the_scale_of_the_spec_leaves_a_head_as_it_is() -> None:
    """It multiplies the scaling of LoRA, and a layer trained whole has none."""
    layer = make_layer("weight", "bias")
    rows = base_rows(layer, draw(4, SIZE_IN), draw(4))
    head = SavedWeights(draw(4, SIZE_IN, seed=1), draw(4, seed=2))
    packed = pack(layer, {"site0": head}, 0.5, FLOAT32, rows)
    np.testing.assert_array_equal(packed["layer.weight"], head.weight)
    np.testing.assert_array_equal(packed["layer.bias"][0], head.bias)


# ---------------------------------------------------------------- assemble


@pytest.mark.parametrize("role", ["output_scale", "bias", "weight"])
def test_slots_without_an_adapter_are_as_the_base(role: str) -> None:
    stack = make_layer(role).stacks[0]
    rows, block = (draw(stack.rows_per_slot, stack.shape[1], seed=seed) for seed in (1, 2))
    whole = assemble(stack, FLOAT32, rows, {2: {stack.name: block}})
    np.testing.assert_array_equal(whole, np.concatenate([rows, rows, block]))


@pytest.mark.parametrize("ahead", [0, SIZE_IN])
def test_factors_of_a_slot_without_an_adapter_are_zero(ahead: int) -> None:
    """Also where W^T stands ahead of them (augmented)."""
    stack = Stack("layer.lora_B", "lora_B", (ahead + SLOTS * MAX_RANK, 4), MAX_RANK, ahead, 0)
    rows, block = draw(ahead, 4), draw(MAX_RANK, 4)
    whole = assemble(stack, FLOAT32, rows if ahead else None, {2: {stack.name: block}})
    np.testing.assert_array_equal(whole, np.concatenate([rows, np.zeros((MAX_RANK, 4)), block]))


# ---------------------------------------------------------------- check_fit

EXTRA = "base_model.model.site0."
ONES = np.ones(4, np.float32)
DORA = {"config": {"use_dora": True}, "tensors": {f"{EXTRA}lora_magnitude_vector": ONES}}
LORA_BIAS = {"config": {"lora_bias": True}, "tensors": {f"{EXTRA}lora_B.bias": ONES}}
BASE_BIAS = {"config": {"bias": "lora_only"}, "tensors": {f"{EXTRA}base_layer.bias": ONES}}


def head_of(width: int, size_in: int = SIZE_IN) -> dict[str, Any]:
    tensor = {"base_model.model.head.weight": np.ones((width, size_in), np.float32)}
    return {"config": {"modules_to_save": ["head"]}, "tensors": tensor}


def fit(folder: Path, layers: list[Layer], **adapter: Any) -> None:
    """Admit an adapter of site0 of rank 3, and what it brings beside."""
    write_adapter(folder, {"site0": (SIZE_IN, 4)}, rank=MAX_RANK, **adapter)
    header = read_adapter(folder)
    sites = [part.site for layer in layers for part in layer.slices]
    check_fit(header, match_sites(header, sites, NO_NAMING), layers)


def head_layer(width: int = 4, **changes: Any) -> Layer:
    made = make_layer("weight", "bias", widths=(width,), **changes)
    return replace(made, name="head", slices=(Slice("head", "head", 0, width),))


@pytest.mark.parametrize(
    ("brings", "roles", "expected"),
    [
        (DORA, (*LORA, "bias"), r"uses DoRA, for which .* no place; add dora to features in the"),
        (LORA_BIAS, (*LORA, "output_scale"), r"brings a bias, for which .* add bias to features"),
        (BASE_BIAS, LORA, r"brings a bias, for which .* add bias to features in the spec"),
        (
            {},
            ("weight", "bias"),
            r"is LoRA, but site 'site0' has room for whole weights only; name",
        ),
    ],
)
def test_what_the_layer_has_no_place_for(
    tmp_path: Path, brings: dict[str, Any], roles: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(AdapterWeightsError, match=f"module 'site0' {expected}"):
        fit(tmp_path, [make_layer(*roles)], **brings)


@pytest.mark.parametrize(
    ("brings", "roles"),
    [
        ({}, LORA),
        (DORA, (*LORA, "output_scale")),
        (DORA, (*LORA, "weight", "bias")),  # the scale is multiplied into the weight
        (LORA_BIAS, (*LORA, "bias")),
        (BASE_BIAS, (*LORA, "weight", "bias")),
    ],
)
def test_what_the_layer_has_a_place_for(
    tmp_path: Path, brings: dict[str, Any], roles: tuple[str, ...]
) -> None:
    fit(tmp_path, [make_layer(*roles)], **brings)


def test_an_adapter_of_another_base_names_the_site_and_its_own_base(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "org/other"}
    expected = (
        r"maps 5 to 4 features, but site 'site0' maps 5 to 7; .* another base, and its config"
    )
    with pytest.raises(AdapterWeightsError, match=f"{expected} names 'org/other'"):
        fit(tmp_path, [make_layer(*LORA, widths=(7,))], config=config)


def test_a_whole_embedding_that_has_no_place(tmp_path: Path) -> None:
    layers = [make_layer(*LORA), replace(head_layer(), kind="embedding", stacks=())]
    with pytest.raises(AdapterWeightsError, match="is an embedding that was trained whole, for"):
        fit(tmp_path, layers, **head_of(4))


def test_two_magnitudes_of_one_module(tmp_path: Path) -> None:
    tensors = {**DORA["tensors"], f"{EXTRA}lora_magnitude_vector.weight": ONES}
    with pytest.raises(AdapterWeightsError, match="are one and the same; remove one"):
        fit(tmp_path, [make_layer(*LORA)], config=DORA["config"], tensors=tensors)


def test_dora_with_a_bias_of_b_is_refused(tmp_path: Path) -> None:
    config = {"use_dora": True, "lora_bias": True}
    with pytest.raises(AdapterConfigError, match="use_dora and lora_bias are both true"):
        fit(tmp_path, [make_layer(*LORA)], config=config)


def test_a_direction_of_length_zero_has_no_output_scale() -> None:
    with pytest.raises(WeightsError, match=r"row 0 of W \+ scaling B A is zero"):
        output_scale(np.zeros((4, SIZE_IN)), replace(lora(4, magnitude=ONES), scaling=0.0), 1.0)


def test_head_where_rows_share_the_bases_weight(tmp_path: Path) -> None:
    other = replace(make_layer(*LORA), name="head", slices=(Slice("head", "head", 0, 4),))
    expected = r"'head' was trained whole, for which .* no place; add heads to features in the spec"
    with pytest.raises(AdapterWeightsError, match=expected):
        fit(tmp_path, [make_layer(*LORA), other], **head_of(4))


def test_only_labels_may_be_fewer(tmp_path: Path) -> None:
    site = make_layer(*LORA)
    fit(tmp_path, [site, head_layer(4, labels=True)], **head_of(3))
    fit(tmp_path, [site, head_layer(4)], **head_of(4))
    with pytest.raises(AdapterWeightsError, match=r"'head' maps 5 to 3 .* site 'head' maps 5 to 4"):
        fit(tmp_path, [site, head_layer(4)], **head_of(3))


@pytest.mark.parametrize(("width", "size_in"), [(5, SIZE_IN), (4, 6)])
def test_head_that_does_not_fit(tmp_path: Path, width: int, size_in: int) -> None:
    expected = rf"'head' maps {size_in} to {width} .* maps 5 to 4; .*needs a build with an adapter"
    layers = [make_layer(*LORA), head_layer(4, labels=True)]
    with pytest.raises(AdapterWeightsError, match=expected):
        fit(tmp_path, layers, **head_of(width, size_in))


def test_a_base_without_a_head_demands_one(tmp_path: Path) -> None:
    layers = [make_layer(*LORA), head_layer(4, labels=True, in_base=False)]
    fit(tmp_path, layers, **head_of(4))
    expected = r"brings no 'head', and the base has none of its own; .*modules_to_save=\['head'\]"
    with pytest.raises(AdapterWeightsError, match=expected):
        fit(tmp_path, layers)


# ---------------------------------------------------------------- dora


def base_folder(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


SITE = "layer.0.q"
WEIGHT = draw(4, 6, seed=3)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({f"{SITE}.weight": WEIGHT}, "as it is named"),
        ({f"bert.{SITE}.weight": WEIGHT}, "under one more prefix"),
        ({"0.q.weight": WEIGHT}, "under one prefix less"),
        ({"other.weight": WEIGHT}, "under a tied name"),
        ({f"{SITE}.weight": WEIGHT.T.copy()}, "as a Conv1D stores it"),
        ({f"{SITE}.weight": WEIGHT.astype(np.float64)}, "widened"),
        (
            {f"{SITE}.weight": draw(4, 6), "a.bias": draw(4), "tied.weight": WEIGHT},
            "beside another of its name",
        ),
        (
            {"ids": np.zeros((1, 6), np.int64), "a.weight": draw(2, 2), "tied.weight": WEIGHT},
            "beside ids, which are no weight",
        ),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_the_bases_weight_is_found_by_its_digest(
    tmp_path: Path, tensors: dict[str, np.ndarray], why: str
) -> None:
    found = find_base_weights(base_folder(tmp_path, tensors), {SITE: digest_array(WEIGHT)})
    np.testing.assert_array_equal(found[SITE], WEIGHT)


def test_a_narrow_checkpoint_of_a_base_that_was_read_wider(tmp_path: Path) -> None:
    narrow = WEIGHT.astype(np.float16)
    base_folder(tmp_path, {f"{SITE}.weight": narrow})
    wide = digest_array(narrow.astype(np.float32))
    np.testing.assert_array_equal(find_base_weights(tmp_path, {SITE: wide})[SITE], narrow)


def test_shards_are_searched(tmp_path: Path) -> None:
    save_file({"a.weight": draw(2, 2)}, tmp_path / "model-00001.safetensors")
    save_file({f"{SITE}.weight": WEIGHT}, tmp_path / "model-00002.safetensors")
    np.testing.assert_array_equal(
        find_base_weights(tmp_path, {SITE: digest_array(WEIGHT)})[SITE], WEIGHT
    )


@pytest.mark.parametrize("tensors", [{}, {f"{SITE}.weight": WEIGHT + 1}])
def test_another_base_has_no_such_weight(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    if tensors:
        base_folder(tmp_path, tensors)
    expected = rf"none of its {len(tensors)} tensors is the weight of site 'layer\.0\.q' by digest"
    with pytest.raises(WeightsError, match=rf"{expected}, which DoRA needs; give the directory"):
        find_base_weights(tmp_path, {SITE: digest_array(WEIGHT)})
