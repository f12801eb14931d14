"""The kernel for products on a CPU, against numpy in float64: values, derivatives, where it is used and where not."""

from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.typing import DTypeLike

from flaxqwen import Qwen2Config, Qwen2ForCausalLM
from flaxqwen.cache import init_cache
from flaxqwen.ops import cpu_kernels
from flaxqwen.ops.cpu import cpu_flags
from flaxqwen.ops.linear import Linear, contract
from flaxqwen.ops.products import (
    FLOAT32_ROWS,
    KERNEL_ROWS,
    SPLIT_ROWS,
    TILE_ROWS,
    contract_by_kernel,
    kernel_serves,
)
from flaxqwen.quantization import quantize_weight
from flaxqwen.sharding import Sharding, make_mesh
from flaxqwen.training import POLICIES
from tests.reference import close

FLOAT32, BFLOAT16, INT8 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.int8)
DTYPES = [(FLOAT32, FLOAT32), (FLOAT32, INT8), (BFLOAT16, BFLOAT16), (BFLOAT16, INT8)]

built = pytest.mark.skipif(not cpu_kernels.BUILT, reason="the build made no kernels for this CPU")


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    if dtype == np.int8:
        return rng.integers(-127, 128, shape).astype(np.int8)
    return rng.standard_normal(shape).astype(dtype)


def test_the_build_makes_kernels():
    """For each set of instructions; of those that this CPU has, the best come first."""
    if shutil.which("g++") is None:
        pytest.skip("there is no compiler")
    flags = cpu_flags().split()  # where this fails: pip install -e ., with -v for the compiler's errors
    needed = {"amx": "amx_tile", "avx512": "avx512_bf16", "avx2": "avx2"}
    assert list(cpu_kernels.BUILT) == [name for name, flag in needed.items() if flag in flags]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 31), (7, 128), (64, 200), (129, 896), (300, 4864)], ids=str)
@pytest.mark.usefixtures("kernels_for")
def test_products(rng: np.random.Generator, dtypes: tuple[np.dtype, np.dtype], size: tuple[int, int]):
    """Of any number of rows, to float32's rounding: 1e-6 of the sum of the products' magnitudes."""
    out, width = size
    weight = drawn(rng, size, dtypes[1])
    for rows in (*range(1, 10), 15, 16, 17, 33, 64, 65, 130, 290):
        x = drawn(rng, (rows, width), dtypes[0])
        y = jax.jit(contract_by_kernel)(x, weight)
        assert y.shape == (rows, out)
        assert y.dtype == jnp.float32
        wide = x.astype(np.float64), weight.astype(np.float64).T
        bound = 1e-6 * (np.abs(wide[0]) @ np.abs(wide[1]))
        assert (np.abs(np.asarray(y, np.float64) - wide[0] @ wide[1]) <= bound).all()


@pytest.mark.parametrize("size", [(1, 1), (37, 129), (100, 896)], ids=str)
@pytest.mark.usefixtures("kernels_for")
def test_rounded_results(rng: np.random.Generator, size: tuple[int, int]):
    """Of bfloat16 they are those of float32, to the nearest, as XLA rounds them; infinities and NaN, too."""
    weight = drawn(rng, size, BFLOAT16)
    for rows in (1, 2, 3, 8, 41, 42, 100, 259):
        x = drawn(rng, (rows, size[1]), BFLOAT16)
        x[-1, -1] = (np.nan, np.inf, 3e38, 1e-20)[rows % 4]
        wide, narrow = (jax.jit(contract_by_kernel, static_argnums=2)(x, weight, t) for t in (FLOAT32, BFLOAT16))
        assert narrow.dtype == jnp.bfloat16
        found, expected = (np.asarray(y, np.float32) for y in (narrow, wide.astype(jnp.bfloat16)))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(1050, 40, 288), (530, 70, 416), (4100, 33, 64), (70, 3700, 64)], ids=str)
@pytest.mark.parametrize("kernels_for", ["amx"], indirect=True)
@pytest.mark.usefixtures("kernels_for")
def test_many_rows(rng: np.random.Generator, dtypes: tuple[np.dtype, np.dtype], case: tuple[int, int, int]):
    """More than are taken at once, or more outputs, and widths whose chunks are not alike: as test_products."""
    rows, out, width = case
    x, weight = drawn(rng, (rows, width), dtypes[0]), drawn(rng, (out, width), dtypes[1])
    wide = x.astype(np.float64), weight.astype(np.float64).T
    bound = 1e-6 * (np.abs(wide[0]) @ np.abs(wide[1]))
    y = np.asarray(jax.jit(contract_by_kernel)(x, weight), np.float64)
    assert (np.abs(y - wide[0] @ wide[1]) <= bound).all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("kernels_for", ["amx"], indirect=True)
@pytest.mark.usefixtures("kernels_for")
def test_memory_of_many_rows(rng: np.random.Generator, dtype: np.dtype):
    """Rows are copied to a program's own memory, which products after each other share; too little is refused."""
    x, weight = jnp.asarray(drawn(rng, (300, 256), dtype)), jnp.asarray(drawn(rng, (256, 256), dtype))
    copy = 320 * 256 * (6 if dtype == FLOAT32 else 2)

    def products(x: jax.Array, count: int) -> jax.Array:
        for _ in range(count):
            x = contract_by_kernel(x, weight, dtype)
        return x

    for count in (2, 9):
        memory = jax.jit(products, static_argnums=1).lower(x, count).compile().memory_analysis()
        assert copy <= memory.temp_size_in_bytes < copy + 2 * x.nbytes + 2**12  # and what lies between products
    few = x[: (SPLIT_ROWS if dtype == FLOAT32 else TILE_ROWS + 1) - 1]  # are not copied
    alone = jax.jit(products, static_argnums=1).lower(few, 1).compile().memory_analysis()
    assert alone.temp_size_in_bytes == 0
    with pytest.raises(jax.errors.JaxRuntimeError, match="too little memory"):
        cpu_kernels.call("Products", jax.typeof(x), x, weight, lent=copy - cpu_kernels.LINE - 1).block_until_ready()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1003, 896])
def test_a_row_does_not_depend_on_the_others(
    rng: np.random.Generator, dtypes: tuple[np.dtype, np.dtype], width: int, kernels_for: str
):
    """To the last bit: alone, and in batches of many sizes; by AMX among few rows, and among many."""
    x, weight = drawn(rng, (300, width), dtypes[0]), drawn(rng, (151, width), dtypes[1])
    sizes = (*range(1, 18), 31, 40, 64, 65, 100, 257, 300)
    most = 300
    if kernels_for == "amx" and width % 64 == 0 and dtypes[1] != BFLOAT16:
        most = SPLIT_ROWS - 1 if dtypes[1] == FLOAT32 else TILE_ROWS
    for among in ([rows for rows in sizes if rows <= most], [rows for rows in sizes if rows > most]):
        whole = np.asarray(jax.jit(contract_by_kernel)(x[-max(among, default=1) :], weight))
        for rows in among:
            np.testing.assert_array_equal(jax.jit(contract_by_kernel)(x[-rows:], weight), whole[-rows:])


@pytest.mark.parametrize("kernels_for", ["amx"], indirect=True)
@pytest.mark.parametrize("rows", [1, 3, 9, 17])
@pytest.mark.usefixtures("kernels_for")
def test_sums_of_integers_are_exact(rng: np.random.Generator, rows: int):
    """By AMX: rounded once, from integers of 24 bits times all of int8's. Rows differ in their powers of two."""
    weight = rng.integers(-128, 128, (41, 448)).astype(np.int8)
    x = rng.integers(-(2**24) + 1, 2**24, (rows, 448))
    power = np.float32(2) ** rng.integers(-60, 40, (rows, 1))
    found = jax.jit(contract_by_kernel)(x.astype(np.float32) * power, weight)
    np.testing.assert_array_equal(found, (x @ weight.T.astype(np.int64)).astype(np.float32) * power)


@pytest.mark.parametrize("kernels_for", ["amx"], indirect=True)
@pytest.mark.usefixtures("kernels_for")
def test_float32_in_parts(rng: np.random.Generator):
    """By AMX, of many rows: all 24 bits count, in x and in the weight, and errors are less than numpy's in float32."""
    numbers, choice = drawn(rng, (96, 96), FLOAT32), np.eye(96, dtype=np.float32)[rng.permutation(96)]
    np.testing.assert_array_equal(jax.jit(contract_by_kernel)(numbers, choice), numbers @ choice.T)
    np.testing.assert_array_equal(jax.jit(contract_by_kernel)(choice, numbers), choice @ numbers.T)
    for width in (896, 4864):
        x, weight = drawn(rng, (100, width), FLOAT32), drawn(rng, (100, width), FLOAT32)
        wanted = x.astype(np.float64) @ weight.astype(np.float64).T
        errors = [np.std(np.asarray(y) - wanted) for y in (jax.jit(contract_by_kernel)(x, weight), x @ weight.T)]
        assert errors[0] <= 0.6 * errors[1]  # 0.3 and 0.4; with sums that go on from chunk to chunk 1.4


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.usefixtures("kernels_for")
def test_rows_of_any_size_with_weights_of_int8(rng: np.random.Generator, dtype: np.dtype):
    """Of numbers that are tiny, huge, zero or far apart, to 1e-6 of the largest; all of int8's weights."""
    weight = np.tile(np.arange(-128, 128, dtype=np.int8), (3, 2))
    weight[1] = rng.permutation(weight[1])
    weight[2] = -128
    x = drawn(rng, (7, 512), dtype)
    x *= np.array([1e-34, 1e-30, 1, 1e30, 3e32, 0, 1], dtype)[:, None]
    x[6] *= np.float32(10) ** rng.integers(-20, 1, 512)
    y = np.asarray(jax.jit(contract_by_kernel)(x, weight), np.float64)
    wide = x.astype(np.float64), weight.astype(np.float64).T
    assert (np.abs(y - wide[0] @ wide[1]) <= 1e-6 * np.abs(wide[0]).max(1, keepdims=True) * 128 * 512).all()
    assert (y[5] == 0).all()


@pytest.mark.usefixtures("kernels_for")
def test_what_is_not_finite_stays_so(rng: np.random.Generator):
    x, weight = drawn(rng, (3, 64), BFLOAT16), drawn(rng, (9, 64), BFLOAT16)
    x[0, 3], x[1, 60] = np.nan, np.inf
    y = np.asarray(jax.jit(contract_by_kernel)(x, np.abs(weight)))
    assert np.isnan(y[0]).all()
    assert (y[1] == np.inf).all()
    assert np.isfinite(y[2]).all()
    for each in (x, x.astype(np.float32)):
        integers = np.asarray(jax.jit(contract_by_kernel)(each, drawn(rng, (9, 64), INT8)))
        assert np.isfinite(integers).tolist() == [[False] * 9, [False] * 9, [True] * 9]
    for dtypes in DTYPES:
        y = jax.jit(contract_by_kernel)(np.tile(x.astype(dtypes[0]), (30, 1)), drawn(rng, (9, 64), dtypes[1]))
        assert np.isfinite(y).tolist() == [[False] * 9, [False] * 9, [True] * 9] * 30


@pytest.mark.usefixtures("kernels_for")
def test_from_many_threads(rng: np.random.Generator):
    """16 calls at a time: each gives its own result, and none waits for another forever."""
    xs, weight = drawn(rng, (64, 3, 256), BFLOAT16), drawn(rng, (4096, 256), BFLOAT16)
    product = jax.jit(contract_by_kernel)
    wanted = [np.asarray(product(x, weight)) for x in xs]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(lambda x: np.asarray(product(x, weight)), xs), wanted, strict=True):
                np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("kernels_for")
def test_derivatives(rng: np.random.Generator):
    """Of x and the weight, each alone, and forward mode; of x alone where the weight is int8."""
    x, dy = drawn(rng, (2, 3, 48), BFLOAT16), drawn(rng, (2, 3, 32), BFLOAT16).astype(np.float32)
    weight = drawn(rng, (32, 48), BFLOAT16)
    wide = [array.astype(np.float64) for array in (x, weight, dy)]
    of_x, of_weight = wide[2] @ wide[1], np.einsum("abo,abi->oi", wide[2], wide[0])

    def loss(x: jax.Array, weight: jax.Array, dtype: DTypeLike = FLOAT32) -> jax.Array:
        return jnp.vdot(contract_by_kernel(x, weight, dtype).astype(jnp.float32), dy)

    for argnums, dtype in itertools.product(((0, 1), (0,), (1,)), (FLOAT32, BFLOAT16)):
        found = jax.jit(jax.grad(partial(loss, dtype=dtype), argnums))(x, weight)
        for gradient, argument in zip(found, argnums, strict=True):
            close(gradient.astype(jnp.float32), (of_x, of_weight)[argument], 4e-3)  # rounded to bfloat16
    _, tangent = jax.jit(partial(jax.jvp, contract_by_kernel))((x, weight), (2 * x, weight))
    close(tangent, 3 * (wide[0] @ wide[1].T), 1e-5)
    integers = drawn(rng, (32, 48), INT8)
    close(jax.jit(jax.grad(loss))(x.astype(np.float32), integers), wide[2] @ integers.astype(np.float64), 1e-5)


@built
def test_a_layer_with_its_derivatives_and_mapped(rng: np.random.Generator):
    """As one whose products are XLA's, which on a mesh they are."""
    config = Qwen2Config(num_attention_heads=2, num_key_value_heads=2)
    sharding = Sharding.fit(make_mesh(devices=jax.devices()[:1]), config)
    ours, plain = (Linear(32, param_dtype=jnp.bfloat16, sharding=each) for each in (None, sharding))
    params = {"params": {"weight": jnp.asarray(drawn(rng, (32, 256), BFLOAT16))}}
    x = jnp.asarray(drawn(rng, (3, 2, 256), BFLOAT16))

    def loss(params: dict, x: jax.Array, layer: Linear) -> jax.Array:
        return jnp.square(jax.vmap(layer.apply, (None, 0))(params, x).astype(jnp.float32)).sum()

    gradients = [jax.jit(jax.grad(partial(loss, layer=layer), (0, 1)))(params, x) for layer in (ours, plain)]
    for mine, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        close(mine.astype(jnp.float32), other.astype(jnp.float32), 2e-2)  # of outputs that were rounded to bfloat16


@built
@pytest.mark.parametrize("is_int8", [False, True])
def test_remat_keeps_products(rng: np.random.Generator, is_int8: bool):
    """As it keeps XLA's dots: "dots" computes none of them again, "full" both."""
    layer, x = Linear(64, param_dtype=jnp.bfloat16), jnp.ones((8, 64), jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    if is_int8:
        values, scale = quantize_weight(drawn(rng, (64, 64), FLOAT32), "int8")
        params = {"params": {"weight": values, "weight_scale": scale}}

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sin(layer.apply(params, jnp.sin(layer.apply(params, jnp.sin(x))))).sum()

    for name, calls in (("dots", 2), ("full", 4)):
        backward = jax.grad(jax.checkpoint(loss, policy=POLICIES[name]))
        assert str(jax.make_jaxpr(backward)(x)).count("ffi_call[") == calls


@pytest.mark.usefixtures("kernels_for")
def test_mapped(rng: np.random.Generator):
    """Over x, over both, and over the weight alone."""
    for (rows, width), axes in itertools.product(((2, 48), (70, 64)), ((0, None), (0, 0), (None, 0))):
        xs, weights = drawn(rng, (4, rows, width), BFLOAT16), drawn(rng, (4, 32, width), BFLOAT16)
        x, weight = xs if axes[0] == 0 else xs[0], weights if axes[1] == 0 else weights[0]
        found = jax.jit(jax.vmap(contract_by_kernel, axes))(x, weight)
        wide = x.astype(np.float64), weight.astype(np.float64).swapaxes(-1, -2)
        close(found, wide[0] @ wide[1], 1e-5)


def calls(module: nn.Module, *arguments: jax.Array, **named: object) -> int:
    """How many calls of the kernel a module's program has."""
    params = jax.eval_shape(module.init, jax.random.key(0), *arguments)
    text = jax.jit(module.apply).lower(params, *arguments, **named).compile().as_text()
    return text.count(f'custom_call_target="{cpu_kernels.target("Products", cpu_kernels.INSTRUCTIONS)}"')


@pytest.mark.parametrize("tied", [True, False])
def test_every_product_of_a_step(tied: bool, kernels_for: str):
    """Of as many rows as it is faster for; of a few q, k and v are one, and gate and up another kernel's."""
    config = Qwen2Config(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    narrow = {1: 7, KERNEL_ROWS: 7, KERNEL_ROWS + 1: 0}
    if kernels_for == "amx":
        narrow |= {KERNEL_ROWS + 1: 15, 300: 15}
    wide = {1: 7, FLOAT32_ROWS: 7, FLOAT32_ROWS + 1: 0}
    if kernels_for == "amx":
        wide |= {SPLIT_ROWS - 1: 0, SPLIT_ROWS: 15, 300: 15}
    served = {jnp.bfloat16: narrow, None: wide}
    cases = [(dtype, *case) for dtype, rows in served.items() for case in rows.items()]
    for dtype, rows, products in cases:
        module = Qwen2ForCausalLM(config, dtype=dtype, param_dtype=dtype or jnp.float32)
        cache = init_cache(config, rows, 64, jnp.bfloat16)
        assert calls(module, jnp.ones((rows, 1), jnp.int32), past_key_values=cache) == products


@built
def test_not_on_a_mesh():
    """Where a weight is cut, the kernel would have it gathered."""
    config = Qwen2Config(num_attention_heads=2, num_key_value_heads=2)
    sharding = Sharding.fit(make_mesh(devices=jax.devices()[:1]), config)
    x = jnp.ones((2, 64), jnp.bfloat16)
    for module, products in (
        (Linear(8, param_dtype=x.dtype), 1),
        (Linear(8, param_dtype=x.dtype, sharding=sharding), 0),
    ):
        assert calls(module, x) == products


@built
def test_quantized_weights(rng: np.random.Generator):
    """int8's go through it as integers, with their scales behind."""
    x, weight = drawn(rng, (8, 64), BFLOAT16), rng.standard_normal((24, 64)).astype(np.float32)
    values, scale = quantize_weight(weight, "int8")
    assert kernel_serves(jnp.asarray(x), values)
    params = {"params": {"weight": values, "weight_scale": scale}}
    text = jax.jit(Linear(24).apply).lower(params, x).compile().as_text()
    assert text.count("custom_call_target") == 1
    found = jax.jit(Linear(24).apply)(params, x)
    wide = np.asarray(values, np.float64) * np.asarray(scale, np.float64)
    close(found.astype(jnp.float32), x.astype(np.float64) @ wide.T, 4e-3)  # rounded to bfloat16


def test_what_it_does_not_serve(kernels_for: str):
    """Weights that would have to be converted first, other dtypes, and more rows."""
    x, weight = jnp.ones((4, 64), jnp.bfloat16), jnp.ones((8, 64), jnp.bfloat16)
    assert kernel_serves(x, weight)
    assert kernel_serves(x.reshape(2, 2, 64), weight)
    assert not kernel_serves(x, weight.astype(jnp.float32))
    assert not kernel_serves(x.astype(jnp.float32), weight)
    assert not kernel_serves(x.astype(jnp.float16), weight.astype(jnp.int8))
    assert not kernel_serves(x, weight[:, :60])  # which XLA refuses by name
    few = list(range(1, 201 if kernels_for == "amx" else KERNEL_ROWS + 1))
    floats = [*range(1, FLOAT32_ROWS + 1), *(range(SPLIT_ROWS, 201) if kernels_for == "amx" else ())]
    for dtypes, expected in (
        ((jnp.float32, jnp.float32), floats),
        ((jnp.bfloat16, jnp.bfloat16), few),
        ((jnp.bfloat16, jnp.int8), few),
        ((jnp.float32, jnp.int8), few),
    ):
        many = jnp.ones((200, 64), dtypes[0])
        served = [rows for rows in range(201) if kernel_serves(many[:rows], weight.astype(dtypes[1]))]
        assert served == expected
    for width, weights in ((16, jnp.bfloat16), (32, jnp.int8), (16, jnp.float32)):  # half of a tile's row
        many = jnp.ones((17, width), jnp.float32 if weights == jnp.float32 else jnp.bfloat16)
        assert not kernel_serves(many, jnp.ones((8, width), weights))


@built
def test_in_shard_map(rng: np.random.Generator):
    """Where arrays have types of a mesh, operations of XLA's serve."""
    mesh = make_mesh(devices=jax.devices()[:1])
    x, weight = jnp.asarray(drawn(rng, (2, 64), BFLOAT16)), jnp.asarray(drawn(rng, (8, 64), BFLOAT16))
    cut, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    product = partial(contract, on_one_device=True)
    found = jax.jit(jax.shard_map(product, mesh=mesh, in_specs=(cut, whole), out_specs=cut))(x, weight)
    close(found.astype(jnp.float32), contract(x, weight).astype(jnp.float32), 1e-2)


@built
def test_libraries_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Damaged, of other sources, for a later jaxlib, without a kernel: a line that names the file, and no kernels."""

    def refused(message: str) -> None:
        with pytest.warns(RuntimeWarning, match=f"cannot be used, install flaxqwen anew: .*{message}"):
            assert cpu_kernels._register() == ()

    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernels, "HANDLERS", ("Products", "Missing"))
        refused("undefined symbol: Missing")
    with monkeypatch.context() as patch:
        header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
        header.parent.mkdir(parents=True)
        header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 0\n")
        patch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
        refused("built with a later jaxlib")
    copies = shutil.copytree(cpu_kernels.FOLDER, tmp_path / "cpp")
    monkeypatch.setattr(cpu_kernels, "FOLDER", copies)
    (copies / "common.h").write_text("// changed")
    refused("built from other sources")
    monkeypatch.setattr(cpu_kernels, "FOLDER", tmp_path / "damaged")
    assert cpu_kernels._register() == ()
    cpu_kernels.FOLDER.mkdir()
    for path in copies.glob("*.so"):
        (cpu_kernels.FOLDER / path.name).write_bytes(path.read_bytes()[:50])
    refused("file too short")
