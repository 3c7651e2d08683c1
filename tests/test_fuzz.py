"""Random graphs, shapes, models and files: every backend computes what the reference does, the integer model what the fake-quantized one does, and a
file that was changed is refused in one sentence or holds a model.

Each example is compared with the reference, on Numba or on Triton (its interpreter where there is no GPU), so all three agree: integers to the bit,
float sums within the bounds that the operations' own tests derive. How many there are, and their largest graph:

==============  =====  ======  ==========================================================================
test            Numba  Triton  what is drawn
==============  =====  ======  ==========================================================================
packed sums       400      30  graph, two schedules, container, features, every subset of the epilogue
products          300      30  rows of any widths, features, columns, every subset of the epilogue
codes             300      20  rows or columns, widths, layout, half precision
nearest groups    200      15  rows, groups
float sums        300      25  graph, schedule, reduction, weights, dtype; sums of codes of any widths
attention         150       6  graph, schedule, heads, channels, edge scores
segments          250      20  lengths, reduction, dtype, and ``scatter`` with its gradient
frozen models     150       5  PyG's GCN, GAT, GIN and GraphSAGE: layers, widths, scheme, features, graph
damaged files     300          bytes flipped, dropped, put in
tampered files    300          a value of the description replaced, dropped, put in, under a right checksum
==============  =====  ======  ==========================================================================

Triton's interpreter takes tens of milliseconds for a launch, so its graphs have at most 12 nodes and 40 features.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch_geometric.data import Data

import qgnn
from qgnn import ops, serialize
from qgnn.integer import IntegerModel
from qgnn.kernels import aggregate, matmul, nearest, packing, quantize
from qgnn.kernels.backend import current_backend
from qgnn.kernels.schedule import build_schedule

from . import test_attention, test_attention_packed, test_nearest, test_quantize, test_scatter
from .assertions import assert_bitwise, assert_sum
from .test_aggregate import check_float, csr, normal
from .test_freeze import graph_data, trained
from .test_serialize import Float, frozen_model, sealed

EXAMPLES = {
    "packed sums": (400, 30),
    "products": (300, 30),
    "codes": (300, 20),
    "nearest groups": (200, 15),
    "float sums": (300, 25),
    "attention": (150, 6),
    "segments": (250, 20),
    "frozen models": (150, 5),
}
"""Examples on Numba, and on Triton."""

seeds = st.integers(0, 2**16)


def fuzz(name: str, device: str, check: Callable[[Any], None], case: st.SearchStrategy[Any]) -> None:
    """Checks as many examples as :data:`EXAMPLES` says, the same in every run."""
    run(check, case, EXAMPLES[name][current_backend(device) == "triton"])


def run(check: Callable[[Any], None], case: st.SearchStrategy[Any], examples: int) -> None:
    ran = 0

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(case)
    def one(drawn: Any) -> None:
        nonlocal ran
        check(drawn)
        ran += 1

    one()
    assert ran >= examples, "hypothesis ran out of examples"


def test_two_thousand_examples_of_the_operations_and_models():
    assert sum(map(sum, EXAMPLES.values())) >= 2000


def largest(device: str) -> tuple[int, int]:
    """Nodes and features of the largest example."""
    return (12, 40) if current_backend(device) == "triton" and device == "cpu" else (30, 140)


# -- what is drawn -----------------------------------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw, nodes, square=False, least=0):
    """Destinations, sources, and edges (source, destination): none, nodes without any, self loops, the same edge often, a hub, two sets of nodes."""
    n = draw(st.integers(least, nodes))
    m = n if square or draw(st.booleans()) else draw(st.integers(0, nodes))
    if not (n and m):
        return n, m, []
    edges = draw(st.lists(st.tuples(st.integers(0, m - 1), st.integers(0, n - 1)), max_size=3 * nodes))
    kind = draw(st.sampled_from(["plain", "duplicates", "self loops", "hub"]))
    if kind == "duplicates":
        edges = edges * 3
    elif kind == "self loops":
        edges = edges + [(i, i) for i in range(min(n, m))]
    elif kind == "hub":
        hub = draw(st.integers(0, n - 1))
        edges = edges + [(e % m, hub) for e in range(draw(st.integers(10, 80)))]
    return n, m, edges


schedules = st.one_of(
    st.just({}),
    st.just({"sort": False}),
    st.fixed_dictionaries({"narrow": st.integers(0, 5), "chunk": st.integers(1, 6)}),
)
"""Options of ``build_schedule``: as by default, in natural order, or with segments and hubs so short that small graphs have them."""


@st.composite
def widths(draw, count, signed, top=8):
    """Widths of rows, which then lie in buckets or in one container: ``bits``, ``pos``, ``counts``."""
    bits = torch.tensor(draw(st.lists(st.integers(0, top), min_size=count, max_size=count)), dtype=torch.uint8)
    if draw(st.booleans()):
        return bits, None, packing.uniform_counts(count, max(top, 1))
    counts, pos = packing.bucket_rows(packing.containers_of(bits, signed))
    return bits, pos, counts


@st.composite
def epilogues(draw, n, f, own, outputs):
    """An output, and its operands (:mod:`qgnn.kernels.matmul`), each there or not; ``own``: the factor of the row's own codes may be among them."""
    g = torch.Generator().manual_seed(draw(seeds))
    shapes = {"row": (n,), **({"own": (1,)} if own else {}), "col": (f,), "bias": (f,), "addend": (n, f), "scale": (f,), "shift": (f,)}  # fmt: skip
    given_ = {k: torch.randn(shape, generator=g) if draw(st.booleans()) else None for k, shape in shapes.items()}
    relu, output, signed = draw(st.booleans()), draw(st.sampled_from(outputs)), draw(st.booleans())
    first = [given_["row"], given_.get("own")] if own is not None else [given_["row"]]
    operands = [*first, *(given_[k] for k in ("col", "bias", "addend")), relu, given_["scale"], given_["shift"]]
    if output == "rows":
        bits, pos, counts = draw(widths(n, signed))
        codes = [torch.rand(n, generator=g) + 0.05, bits, pos, counts, signed]
    elif output == "columns":
        container = draw(st.sampled_from([4, 8]))
        bits = torch.randint(0, container + 1, (f,), generator=g).to(torch.uint8)
        codes = [torch.rand(f, generator=g) + 0.05, bits, None, packing.uniform_counts(n, container), True]
    else:
        codes = [None, None, None, [0] * 5, True]
    return output, *operands, *codes


def on(device: str, values: Any) -> list[Any]:
    return [v.to(device) if isinstance(v, Tensor) else v for v in values]


def random_codes(n: int, f: int, seed: int) -> Tensor:
    """Bytes: as codes of any container, whose bits above are dropped, both ends of the range are among them."""
    return torch.randint(0, 256, (n, f), generator=torch.Generator().manual_seed(seed))


# -- operations --------------------------------------------------------------------------------------------------------------------------------


def test_packed_sums(backend):
    nodes, features = largest(backend)

    @st.composite
    def cases(draw):
        n, m, edges = draw(graphs(nodes))
        f, container = draw(st.integers(0, features)), draw(st.sampled_from([0, 1, 2, 4, 8]))
        tail = draw(epilogues(n, f, n == m, ["acc", "float", "rows"]))
        return n, m, edges, f, container, draw(st.booleans()), tail, draw(st.tuples(schedules, schedules)), draw(seeds)

    def check(case):
        n, m, edges, f, container, signed, tail, options, seed = case
        indptr, indices = csr(n, edges)
        x = packing.pack_reference(random_codes(m, f, seed), None, packing.uniform_counts(m, container)).to(backend)
        for option in options:
            schedule = on(backend, build_schedule(indptr, **option))
            arguments = (
                indptr.to(backend),
                indices.to(backend),
                schedule,
                x,
                container,
                m,
                f,
                signed,
                *on(backend, tail),
            )
            # whatever the schedule: the reference does not look at it
            expected = aggregate.aggregate_packed_reference(*arguments)
            assert_bitwise(aggregate.aggregate_packed(*arguments), expected, tail[0])

    fuzz("packed sums", backend, check, cases())


def test_products(backend):
    nodes, features = largest(backend)

    @st.composite
    def cases(draw):
        n, k, m = draw(st.integers(0, nodes)), draw(st.integers(0, features)), draw(st.integers(0, nodes))
        signed, zero = draw(st.booleans()), draw(st.sampled_from([0, 0, 1, 17, 255]))
        tail = draw(epilogues(n, m, None, ["acc", "float", "rows", "columns"]))
        return draw(widths(n, signed)), k, m, signed, zero, draw(st.sampled_from([4, 8])), tail, draw(seeds)

    def check(case):
        (_, pos, counts), k, m, signed, zero, container, tail, seed = case
        x = packing.pack_reference(random_codes(sum(counts), k, seed), pos, counts)
        w = packing.pack_reference(random_codes(m, k, seed + 1), None, packing.uniform_counts(m, container))
        arguments = on(backend, (x, pos, counts, signed, zero, w, container, k, m, *tail))
        assert_bitwise(matmul.matmul_packed(*arguments), matmul.matmul_packed_reference(*arguments), tail[0])

    fuzz("products", backend, check, cases())


def test_codes(backend):
    nodes, features = largest(backend)
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    case = st.tuples(
        st.integers(0, nodes), st.integers(0, features), st.booleans(), st.booleans(), st.sampled_from(dtypes), st.booleans(),
        st.integers(0, 255), seeds,
    )  # fmt: skip

    def check(case):
        n, f, row, signed, dtype, mixed, zero, seed = case
        x, step, bits = test_quantize.problem(n, f, row, signed, backend, dtype, seed)
        places = test_quantize.layout(bits, n, row, signed) if mixed else (packing.uniform_counts(n, 8), None)
        counts, pos = places
        data, clip, *_ = quantize.quantize(x, step, bits, row, signed, pos, counts, False)
        codes, clipped = quantize.codes_reference(x, step, bits, row, signed)
        assert_bitwise(data, packing.pack_reference(codes, pos, counts), "packed codes")
        assert_bitwise(clip, packing.pack_bits_reference(clipped), "clip bits")
        assert_bitwise(packing.unpack_reference(data, pos, counts, f, signed), codes, "unpacked codes")
        arguments = (data, step, row, signed, zero, pos, counts, f)
        assert_bitwise(quantize.dequantize(*arguments), quantize.dequantize_reference(*arguments), "dequantized")
        faked = quantize.fake_quantize(x, step, bits, row, signed, False)
        expected = quantize.fake_quantize_reference(x, step, bits, row, signed, False)
        for actual, wanted in zip(faked, expected, strict=True):
            assert_bitwise(actual, wanted, "fake-quantized")

    fuzz("codes", backend, check, case)


def test_nearest_groups(backend):
    nodes, features = largest(backend)
    case = st.tuples(
        st.integers(0, 4 * nodes), st.integers(0, features), st.integers(1, 70), st.booleans(), st.sampled_from([0, 1, 2, 4, 8]), seeds
    )  # fmt: skip

    def check(case):
        n, f, m, signed, container, seed = case
        problem = test_nearest.problem(n, f, m, signed, backend, seed=seed)
        test_nearest.check_fused(*problem, signed)
        test_nearest.check_packed(*problem, signed, container)
        x, *_, q_max = problem
        absmax = x.nan_to_num(posinf=3e4).abs().amax(1) if f else torch.zeros(n, device=backend)
        group = nearest.nearest_group(absmax, *nearest.group_table(q_max))
        assert_bitwise(group, test_nearest.brute_force(absmax, q_max), "group")

    fuzz("nearest groups", backend, check, case)


def test_float_sums(backend):
    nodes, features = largest(backend)
    dtypes = [torch.float32, torch.float16, torch.bfloat16]

    @st.composite
    def cases(draw):
        n, m, edges = draw(graphs(nodes))
        reduce, kind = draw(st.sampled_from(["sum", "mean", "max", "min", "codes"])), draw(st.sampled_from(dtypes))
        signed = draw(st.booleans())
        rows = (*draw(widths(m, signed)), signed)
        return (
            n,
            m,
            edges,
            draw(st.integers(0, features)),
            reduce,
            kind,
            draw(st.booleans()),
            rows,
            draw(schedules),
            draw(seeds),
        )

    def check(case):
        n, m, edges, f, reduce, dtype, weighted, (_, pos, counts, signed), options, seed = case
        indptr, indices = csr(n, edges)
        structure = (indptr.to(backend), indices.to(backend), on(backend, build_schedule(indptr, **options)))
        weight = normal(len(edges), device=backend, seed=seed + 1) if weighted else None
        if reduce == "codes":
            data = packing.pack_reference(random_codes(m, f, seed), pos, counts)
            check_rows(structure, *on(backend, (data, pos, counts, f, signed)), weight, seed)
            return
        x = normal(m, f, device=backend, seed=seed).to(dtype)
        if reduce in ("max", "min") and seed % 2:  # ties, NaN and infinity
            x = x.round()
            x[normal(m, f, device=backend, seed=seed + 2) > 1.5] = torch.nan
            x[normal(m, f, device=backend, seed=seed + 3) > 1.5] = torch.inf
        check_float(*structure, x, None if weight is None else weight.to(dtype), reduce)

    fuzz("float sums", backend, check, cases())


def check_rows(structure, data, pos, counts, f, signed, weight, seed):
    n, m = structure[0].numel() - 1, sum(counts)
    g = torch.Generator().manual_seed(seed)
    step, row_scale, bias = (torch.rand(k, generator=g).to(data.device) for k in (m, n, f))
    arguments = (*structure, data, pos, counts, f, signed, step, weight, row_scale, bias, bool(seed % 2))
    values = (step.unsqueeze(1) * packing.unpack_reference(data, pos, counts, f, signed)).abs()
    absolute = None if weight is None else weight.abs()
    magnitude = aggregate.aggregate_reference(*structure, values, absolute, "sum")[0] * row_scale.unsqueeze(1) + bias
    degree = int((structure[0][1:] - structure[0][:-1]).max()) if n else 0
    actual = aggregate.aggregate_rows(*arguments)
    assert_sum(actual, aggregate.aggregate_rows_reference(*arguments), magnitude, degree)


def test_attention_of_any_graph(backend):
    nodes, _ = largest(backend)
    case = st.tuples(
        graphs(nodes), st.integers(1, 4), st.integers(1, 12), st.sampled_from([1, 2, 4, 8]), st.booleans(), schedules, st.integers(0, 99)
    )  # fmt: skip

    def check(case):
        graph, heads, channels, container, extras, options, seed = case
        c = test_attention.Case(*graph, heads, channels, backend, extras=extras, seed=seed, schedule=options)
        test_attention.check_softmax(c)
        if extras:
            test_attention.check_gat(c)
        else:
            test_attention_packed.check(c, container, seed)
            test_attention_packed.check_scores(graph[1], heads, channels, container, backend)

    fuzz("attention", backend, check, case)


def test_segments(backend):
    nodes, features = largest(backend)
    case = st.tuples(
        st.lists(st.integers(0, 9), max_size=nodes), st.integers(0, features), st.sampled_from(test_scatter.REDUCTIONS),
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64]), seeds,
    )  # fmt: skip

    def check(case):
        lengths, f, reduce, dtype, seed = case
        indptr, indices = test_scatter.structure(lengths, backend)
        x = 3 * normal(indices.numel(), f, device=backend, seed=seed)
        if dtype.is_floating_point or reduce != "mean":
            test_scatter.check_reduce(indptr, indices, x.to(dtype), reduce)
        index = (
            test_scatter.random_index(len(lengths), indices.numel(), device=backend, seed=seed) if lengths else indices
        )
        results = []
        for name in (current_backend(backend), "reference"):
            with qgnn.use_backend(name):
                leaf = x.round().clamp(-2, 2).requires_grad_()
                out = ops.scatter(leaf, index, 0, len(lengths), reduce)
                upstream = normal(*out.shape, device=backend, seed=seed + 1).round()
                results.append([out, *torch.autograd.grad(out, leaf, upstream)])
        # small integers: sums and products of -2..2 are exact below 2^24, means and the quotients of a mul's gradient round once or twice
        for actual, expected in zip(*results, strict=True):
            exact = reduce in ("sum", "max", "min")
            torch.testing.assert_close(actual, expected, rtol=0 if exact else 4 * 2.0**-24, atol=0)

    fuzz("segments", backend, check, case)


# -- models ------------------------------------------------------------------------------------------------------------------------------------

MODELS = {"gcn": pyg.GCN, "gat": pyg.GAT, "gin": pyg.GIN, "sage": pyg.GraphSAGE}
SCHEMES = ("int8", "int4", "a2q", "a2q-nns-m5")


def test_frozen_models(backend):
    nodes, _ = largest(backend)
    small = current_backend(backend) == "triton"

    @st.composite
    def cases(draw):
        kind, scheme = draw(st.sampled_from(sorted(MODELS))), draw(st.sampled_from(SCHEMES))
        # groups are spread over the nodes of the first batch, which then has some
        n, _, edges = draw(graphs(nodes, square=True, least=int("nns" in scheme)))
        heads = draw(st.integers(1, 3)) if kind == "gat" else 1
        inputs, hidden, layers, outputs = (draw(st.integers(1, most)) for most in (24, 12, 2 if small else 3, 7))
        features = draw(st.sampled_from(["binary", "normalised", "non-negative", "signed"]))
        norm = "batch_norm" if n > 1 and draw(st.booleans()) else None  # of one row there is none in training
        sizes = (inputs, heads * hidden, layers, outputs)
        return n, edges, kind, scheme, sizes, {"heads": heads} if kind == "gat" else {}, norm, features, draw(seeds)

    def check(case):
        n, edges, kind, scheme, (inputs, hidden, layers, outputs), options, norm, features, seed = case
        torch.manual_seed(seed)
        x = graph_data(features, max(n, 1)).x[:n].repeat(1, 1)[:, :inputs]
        edge_index = torch.tensor(edges, dtype=torch.int64).view(-1, 2).t().contiguous()
        data = Data(x=x.contiguous(), edge_index=edge_index)
        data = data.to(backend)
        plain = MODELS[kind](inputs, hidden, layers, outputs, norm=norm, **options).to(backend)
        try:
            model = trained(plain, scheme, data, steps=2)
            frozen = qgnn.freeze(model, data)
        except ValueError as error:
            if "rows of 0 and one constant at first" not in str(error):
                raise
            reject()  # a few columns after a ReLU are that by chance
        assert_explained(frozen)
        out = frozen(data.x, data.edge_index)
        assert_bitwise(frozen(), out, "bound")
        with qgnn.use_backend("reference"):
            if kind != "gat":
                assert_bitwise(frozen(data.x, data.edge_index), out, "reference")
                return
            exact = qgnn.freeze(model, data)
        assert_explained(exact)
        if out.numel() and not frozen.report.ties and not exact.report.ties:
            # float sums in another order; without ties all codes are equal, and what is left is what NUMERICS 7 grants
            assert (out - exact()).abs().max() <= 1e-4 * out.abs().max()

    fuzz("frozen models", backend, check, cases())


def assert_explained(frozen):
    """Without ties nothing differs, and logits agree to 1e-4 (NUMERICS 7)."""
    if frozen.report.ties == 0:
        assert frozen.report.inherited == 0, "codes differ, and no tie explains it"
        assert frozen.report.max_relative < 1e-4


# -- files -------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["a2q-gcn", "int8-gat", "float"])
def saved(request, tmp_path_factory):
    """A model file: its path, bytes, tensors and description."""
    models = {
        "a2q-gcn": ("a2q", None),
        "int8-gat": ("int8", pyg.GAT(20, 6, 2, 3, heads=2)),
        "float": ("a2q-nns-m20", Float()),
    }
    path = tmp_path_factory.mktemp("fuzz") / "model"
    with qgnn.use_backend("reference"):
        qgnn.save(frozen_model(*models[request.param])[0], path)
    with safe_open(path, framework="pt") as file:
        description = json.loads(serialize.unpack_header(file.metadata()["qgnn"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    return path, path.read_bytes(), tensors, description


def loaded(path):
    """The model of a file, or None if it is refused in one sentence that names the file."""
    try:
        return qgnn.load(path)
    except ValueError as error:
        assert re.match(re.escape(str(path)), str(error)) and error.__cause__ is None
        return None


def test_damaged_files(saved, tmp_path):
    _, whole, tensors, _ = saved
    path = tmp_path / "model"
    place = st.integers(0, len(whole) - 1)
    damage = st.tuples(
        st.sampled_from(["flip", "set", "cut", "drop", "insert", "repeat"]),
        place,
        st.integers(0, 255),
        st.integers(1, 9),
    )

    def check(changes):
        data = bytearray(whole)
        for kind, at, value, count in changes:
            before, after = data[:at], data[at:]
            data = {
                "flip": before + bytes([after[0] ^ (1 << value % 8)] if after else []) + after[1:],
                "set": before + bytes([value] * count) + after[count:],
                "cut": before,
                "drop": before + after[count:],
                "insert": before + bytes([value] * count) + after,
                "repeat": data + after,
            }[kind]
        path.write_bytes(data)
        model = loaded(path)
        if model is not None:
            state = serialize._compacted(model.state_dict())[0]
            assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())

    run(check, st.lists(damage, min_size=1, max_size=3), 100)


def places(value, path=()):
    """The paths of all values in a description."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


VALUES = [
    None, True, False, 0, 1, -1, 2, 8, 2**20, 2**64, -(2**70), 1.5, float("nan"), "", "x", "\u00e9", "a b", [], [[]], {}, {"node": "x"},
    {"slice": 1}, {"dict": {"a, b": 1}},
]  # fmt: skip


def test_tampered_descriptions(saved, tmp_path):
    _, _, tensors, description = saved
    path = tmp_path / "model"
    spots = list(places(description))
    change = st.tuples(
        st.sampled_from(["replace", "drop", "insert", "copy"]),
        st.sampled_from(spots),
        st.sampled_from(VALUES),
        st.sampled_from(spots),
    )

    def check(changes):
        changed = copy.deepcopy(description)
        for kind, spot, value, other in changes:
            try:
                holder, source = at(changed, spot[:-1]), copy.deepcopy(at(changed, other))
            except (KeyError, IndexError, TypeError):
                continue  # a change before has taken it away
            key = spot[-1]
            if kind == "insert" and isinstance(holder, list):
                holder.insert(key, value)
            elif kind == "drop" and isinstance(holder, list | dict) and (isinstance(holder, dict) or key < len(holder)):
                holder.pop(key, None) if isinstance(holder, dict) else holder.pop(key)
            elif isinstance(holder, dict) or (isinstance(holder, list) and key < len(holder)):
                holder[key] = source if kind == "copy" else value
        sealed(tensors, path, json.dumps(changed))
        model = loaded(path)
        assert model is None or isinstance(model, IntegerModel)

    run(check, st.lists(change, min_size=1, max_size=3), 100)


def at(value, path):
    for key in path:
        value = value[key]
    return value
