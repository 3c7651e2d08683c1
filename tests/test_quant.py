"""Quantizers: scheme names, ranges, Degree-Quant's protection, A2Q's learned widths, and the bookkeeping, with numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qgnn import Graph, quant
from qgnn.nn import GCNConv, Linear
from qgnn.quant import (
    A2QQuantizer,
    BinaryQuantizer,
    FeatureMap,
    GroupQuantizer,
    HalfQuantizer,
    QATQuantizer,
    Quantizer,
    RangeQuantizer,
    Scheme,
    averages,
    feature_maps,
    memory_kb,
    memory_penalty,
    parse,
    protection_probability,
    protective_mask,
    set_enabled,
)

EDGES = torch.tensor([[0, 1, 2, 3, 0, 1], [1, 2, 0, 0, 2, 0]])


@pytest.fixture
def backend(backend):
    """On a GPU the test's tensors are made there."""
    with torch.device(backend):
        yield backend


class TwoLayers(nn.Module):
    def __init__(self, scheme: str, num_nodes: int | None = None) -> None:
        super().__init__()
        self.first = GCNConv(6, 8, scheme=scheme, num_nodes=num_nodes)
        self.second = GCNConv(8, 3, scheme=scheme, num_nodes=num_nodes)

    def forward(self, x, edge_index):
        return self.second(self.first(x, edge_index).relu(), edge_index)


# schemes ------------------------------------------------------------------------------------------------------------------------------


def test_named_schemes():
    assert parse("fp32").method == "fp32"
    assert (parse("int8").method, parse("int8").bits) == ("qat", 8)
    assert (parse("dq-int4").method, parse("dq-int4").bits) == ("dq", 4)
    assert (parse("a2q").method, parse("a2q").bits) == ("a2q", 4)
    for name in quant.SCHEMES:
        assert parse(name).name == name
        assert parse(parse(name)) is parse(name)


def test_scheme_suffixes():
    scheme = parse("int4-ste-minmax-percentile")
    assert scheme == Scheme("int4-ste-minmax-percentile", "qat", 4, observer="minmax", percentile=0.01, ste="pass")
    scheme = parse("int8-clip-momentum-extremes")
    assert (scheme.bits, scheme.ste, scheme.observer, scheme.percentile) == (8, "clip", "momentum", 0.0)
    scheme = parse("a2q-steps-input")
    assert (scheme.learn_steps, scheme.learn_bits, scheme.learn_input) == (True, False, True)


@pytest.mark.parametrize(
    "name",
    [
        "int3",
        "int8-fast",
        "dq",
        "a2q-minmax",
        "a2q-m4",
        "a2q-nns-manual",
        "a2q-nns-input",
        "a2q-nns-m0",
        "fp32-clip",
        "fp16-clip",
        "",
        "INT8",
        "int8-",
    ],
)
def test_unknown_schemes_say_what_there_is(name):
    with pytest.raises(
        ValueError,
        match=f"there is no scheme '{name}'; choose one of fp32, fp16, int8, int4, nqat-int8, nqat-int4, dq-int8, dq-int4, a2q",
    ):
        parse(name)


@pytest.mark.parametrize("name", ["int8-clip-ste", "a2q-fixed-bits", "a2q-input-input", "a2q-nns-m4-m8"])
def test_choices_that_exclude_each_other(name):
    with pytest.raises(ValueError, match=f"scheme '{name}' says .* more than once"):
        parse(name)


def test_quantizer_of_every_scheme():
    kinds = {
        "int8": QATQuantizer,
        "dq-int4": QATQuantizer,
        "a2q": A2QQuantizer,
        "a2q-nns": GroupQuantizer,
        "fp16": HalfQuantizer,
        "bi": BinaryQuantizer,
    }
    assert GCNConv(2, 2).quantizer is None
    for scheme, kind in kinds.items():
        assert type(GCNConv(2, 2, scheme=scheme, num_nodes=3).quantizer) is kind
    with pytest.raises(ValueError, match=r"pass num_nodes"):
        Linear(2, 2, scheme="a2q")


# ranges -------------------------------------------------------------------------------------------------------------------------------


def ranged(
    observer: str, *batches: list[float], symmetric: bool = False, bits: int = 4, **more: object
) -> RangeQuantizer:
    quantizer = RangeQuantizer(Scheme("test", "qat", bits, observer=observer, **more), symmetric)
    for batch in batches:
        quantizer.observe(torch.tensor([batch]))
    return quantizer


def test_minmax_keeps_the_extremes():
    quantizer = ranged("minmax", [-1.0, 2.0], [-0.5, 3.0], [0.0, 0.0])
    assert (quantizer.low.item(), quantizer.high.item()) == (-1.0, 3.0)


def test_momentum_moves_by_a_hundredth():
    quantizer = ranged("momentum", [-1.0, 2.0], [-2.0, 0.0])
    assert quantizer.low.item() == pytest.approx(-1.0 + 0.01 * (-2.0 + 1.0))
    assert quantizer.high.item() == pytest.approx(2.0 + 0.01 * (0.0 - 2.0))
    quantizer.observe(torch.tensor([[5.0, 6.0]]))
    assert quantizer.low.item() == pytest.approx(-1.01 + 0.01 * (5.0 + 1.01))
    assert quantizer.high.item() == pytest.approx(1.98 + 0.01 * (6.0 - 1.98))


def test_percentile_clips_both_ends():
    values = list(range(1000))
    quantizer = ranged("minmax", [float(v) for v in values], percentile=0.01)
    assert (quantizer.low.item(), quantizer.high.item()) == (10.0, 989.0)  # ten values cut off at each end
    quantizer = ranged("minmax", [float(v) for v in values], percentile=0.001)
    assert (quantizer.low.item(), quantizer.high.item()) == (1.0, 998.0)
    quantizer = ranged("minmax", [5.0, 1.0, 3.0], percentile=0.001)  # too few for a value to be cut off
    assert (quantizer.low.item(), quantizer.high.item()) == (1.0, 5.0)


def test_percentile_of_a_sample():
    torch.manual_seed(0)
    quantizer = ranged("minmax", [float(v) for v in range(10_000)], percentile=0.05, sample=0.1)
    # 1000 values drawn: the 50th has mean 500 and deviation about 70
    assert 150 < quantizer.low.item() < 850
    assert 9150 < quantizer.high.item() < 9850


def test_affine_scale_and_zero_point():
    quantizer = ranged("minmax", [-1.0, 2.0])  # 4 bits: 3 / 15
    assert quantizer.step().tolist() == pytest.approx([0.2])
    assert quantizer.zero().tolist() == [5]
    assert quantizer.zero().dtype == torch.int32
    quantizer = ranged("minmax", [1.0, 3.0])  # widened to hold 0
    assert quantizer.step().tolist() == pytest.approx([0.2])
    assert quantizer.zero().tolist() == [0]
    quantizer = ranged("minmax", [-3.0, -1.0])
    assert quantizer.zero().tolist() == [15]
    out = quantizer.eval()(torch.tensor([[-3.0, -1.1, 0.0, 1.0, -9.0]]))
    assert out.tolist() == [pytest.approx([-3.0, -1.0 if round(-5.5) == -5 else -1.2, 0.0, 0.0, -3.0], abs=1e-6)]
    quantizer = ranged("minmax", [0.0, 0.0])  # an empty range
    assert (quantizer.step().tolist(), quantizer.zero().tolist()) == ([1.0], [0])
    quantizer = ranged("minmax")  # nothing seen
    assert (quantizer.step().tolist(), quantizer.zero().tolist()) == ([1.0], [0])


def test_symmetric_step():
    quantizer = ranged("minmax", [-1.4, 0.7], symmetric=True)  # 4 bits: Q = 7
    assert quantizer.step().tolist() == pytest.approx([0.2])
    out = quantizer.eval()(torch.tensor([[-1.4, -5.0, 0.31, 0.29, 0.0, 1.4]]))
    assert out.tolist() == [pytest.approx([-1.4, -1.4, 0.4, 0.2, 0.0, 1.4], abs=1e-6)]


def test_ranges_are_taken_in_training_and_once_before():
    quantizer = RangeQuantizer(parse("int8-minmax"), symmetric=False).eval()
    quantizer(torch.tensor([[0.0, 1.0]]))
    assert quantizer.high.item() == 1.0  # the first batch, wherever it comes from
    quantizer(torch.tensor([[0.0, 2.0]]))
    assert quantizer.high.item() == 1.0
    quantizer.train()(torch.tensor([[0.0, 3.0]]))
    assert quantizer.high.item() == 3.0


def test_protected_rows_pass_and_are_not_observed(backend):
    x = torch.tensor([[0.0, 1.0], [50.0, -70.0], [0.33, 0.66]])
    protect = torch.tensor([False, True, False])
    for symmetric in (False, True):
        quantizer = RangeQuantizer(parse("int4-minmax"), symmetric)
        out = quantizer(x, protect)
        assert torch.equal(out[1], x[1])
        assert not torch.equal(out[2], x[2])
        assert (quantizer.low.item(), quantizer.high.item()) == (0.0, 1.0)
    quantizer(x, torch.tensor([True] * 3))  # all of them
    assert (quantizer.low.item(), quantizer.high.item()) == (0.0, 1.0)


@pytest.mark.parametrize("ste", ["clip", "pass"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_range_quantizer_gradient(ste, symmetric):
    quantizer = ranged("minmax", [-1.0, 1.0], symmetric=symmetric, ste=ste).eval()
    x = torch.tensor([[-3.0, -0.4, 0.2, 3.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(quantizer(x).sum(), x)
    assert gradient.tolist() == [[0, 1, 1, 0] if ste == "clip" else [1] * 4]


# protection ---------------------------------------------------------------------------------------------------------------------------


def test_protection_probability_by_hand():
    p = protection_probability(torch.tensor([3, 1, 1, 7, 3]), 0.1, 0.3)
    # smaller degrees: 1 has 0, 3 has 2, 7 has 4; interpolated from 0 of 4 to 4 of 4
    assert p.tolist() == pytest.approx([0.2, 0.1, 0.1, 0.3, 0.2])
    assert p.dtype == torch.float32


def test_protection_probability_of_equal_degrees_is_the_highest():
    assert protection_probability(torch.tensor([2, 2, 2]), 0.0, 0.1).tolist() == pytest.approx([0.1] * 3)
    assert protection_probability(torch.empty(0, dtype=torch.long), 0.0, 0.1).shape == (0,)


def test_protection_probability_per_graph():
    degree, batch = torch.tensor([1, 5, 9, 100, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1, 2])
    p = protection_probability(degree, 0.0, 0.2, batch)
    assert p.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.2, 0.0, 0.0, 0.2])
    parts = [protection_probability(degree[batch == g], 0.0, 0.2) for g in range(3)]
    assert torch.equal(torch.cat(parts), p)
    order = torch.randperm(7)
    assert torch.equal(protection_probability(degree[order], 0.0, 0.2, batch[order]), p[order])


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.1), (0.2, 0.1), (0.0, 1.1)])
def test_protection_probability_errors(low, high):
    with pytest.raises(ValueError, match=r"protection needs 0 <= p_min <= p_max <= 1"):
        protection_probability(torch.tensor([1]), low, high)


def test_masks_are_drawn_anew_for_every_layer_and_step(monkeypatch):
    masks = []
    monkeypatch.setattr(
        "qgnn.quant.protective_mask", lambda *arguments: masks.append(protective_mask(*arguments)) or masks[-1]
    )
    torch.manual_seed(0)
    edge_index = torch.randint(0, 200, (2, 600))
    model = TwoLayers("dq-int8")
    for _ in range(2):
        model(torch.randn(200, 6), edge_index)
    assert len(masks) == 4
    for i, mask in enumerate(masks):
        assert mask.dtype == torch.bool
        assert 0 < mask.float().mean() < 0.1  # p from 0 to 0.1 by rank
        assert not any(torch.equal(mask, other) for other in masks[:i])
    masks.clear()
    model.eval()(torch.randn(200, 6), edge_index)
    set_enabled(model, False)
    model.train()(torch.randn(200, 6), edge_index)
    assert not masks
    assert all(m.protect is None for m in model.modules() if isinstance(m, Quantizer))


def test_mask_follows_the_in_degree():
    edge_index = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 0, 1]])
    scheme = Scheme("test", "dq", 8, p_min=0.0, p_max=1.0)
    mask = protective_mask(scheme, Graph.from_edge_index(edge_index, 6))
    assert mask[0]  # the highest in-degree has probability 1
    assert not mask[2:].any()  # the lowest 0


def test_protected_nodes_skip_quantization_and_weights_do_not(monkeypatch):
    layer = GCNConv(6, 4, scheme="dq-int4", add_self_loops=False)
    x = torch.randn(4, 6)
    monkeypatch.setattr("qgnn.quant.protective_mask", lambda scheme, graph: torch.ones(4, dtype=torch.bool))
    out = layer(x, EDGES)
    weight = layer.quantizer.weight.eval()(layer.lin.weight)
    assert not torch.equal(weight, layer.lin.weight)
    exact = GCNConv(6, 4, add_self_loops=False)
    exact.load_state_dict({"lin.weight": weight.detach(), "bias": layer.bias.detach()})
    torch.testing.assert_close(out, exact(x, EDGES))


# a2q ----------------------------------------------------------------------------------------------------------------------------------


def a2q_model(nodes: int = 4) -> TwoLayers:
    torch.manual_seed(0)
    model = TwoLayers("a2q", nodes)
    model(torch.randn(nodes, 6), EDGES)
    return model


def test_kind_is_found_from_the_first_batch():
    for x, kind in (
        (torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), "binary"),
        (torch.tensor([[0.0, 0.5], [0.2, 0.2], [0.0, 0.0], [3.0, 0.0]]), "binary"),  # row-normalised 0/1
        (torch.tensor([[0.0, 1.0], [1.0, 0.5], [0.0, 0.0], [1.0, 0.0]]), "unsigned"),
        (torch.tensor([[0.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), "signed"),
        (torch.zeros(4, 2), "unsigned"),
        (
            torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.5, 0.0]]),
            "unsigned",
        ),  # no row says that its values are equal
    ):
        for scheme in ("a2q", "int8"):
            layer = GCNConv(2, 3, scheme=scheme, num_nodes=4)
            assert layer.quantizer.kind == "new"
            layer(x, EDGES)
            assert layer.quantizer.kind == kind
            if kind == "binary":
                with pytest.raises(ValueError, match="now it has others"):
                    layer(torch.randn(4, 2), EDGES)
            else:
                layer(torch.randn(4, 2), EDGES)
            assert layer.quantizer.kind == kind


def test_memory_by_hand():
    model = a2q_model()
    # maps that are learned: 4 nodes x 6 and 4 nodes x 8, 8192 bits a KB
    model.first.quantizer.bits.data = torch.tensor([1.0, 2.5, 3.0, 4.0])
    model.second.quantizer.bits.data = torch.tensor([2.0, 2.0, 2.0, 0.0])
    size = memory_kb(model)
    assert size.item() == pytest.approx((6 * 10.5 + 8 * 6) / 8192)
    size.backward()
    assert model.first.quantizer.bits.grad.tolist() == pytest.approx([6 / 8192] * 4)
    assert model.second.quantizer.bits.grad.tolist() == pytest.approx([8 / 8192] * 4)


def test_memory_counts_learned_maps_only():
    model = TwoLayers("a2q", 4)
    model((torch.rand(4, 6) > 0.5).float(), EDGES)
    assert model.first.quantizer.kind == "binary"
    model.second.quantizer.bits.data.fill_(2.0)
    assert memory_kb(model).item() == pytest.approx(8 * 8 / 8192)
    set_enabled(model, False)
    assert memory_kb(model).item() == 0
    assert memory_kb(TwoLayers("int8")).item() == 0


def test_penalties_by_hand():
    model = a2q_model()
    for layer in (model.first, model.second):
        layer.quantizer.bits.data.fill_(4.0)
    size = (6 + 8) * 16 / 8192
    for target in (0.5 * size, 2 * size):
        assert memory_penalty(model, target).item() == pytest.approx((size - target) ** 2, rel=1e-5)
    assert memory_penalty(model, 0.5 * size, "relu").item() == pytest.approx((0.5 * size) ** 2, rel=1e-5)
    below = memory_penalty(model, 2 * size, "relu")
    assert below.item() == 0
    below.backward()
    assert not model.first.quantizer.bits.grad.any()
    with pytest.raises(ValueError, match=r"penalty must be one of \('square', 'relu'\), got 'abs'"):
        memory_penalty(model, 1.0, "abs")


def test_steps_start_from_the_first_batch_and_stay_positive():
    model = a2q_model()
    quantizer = model.first.quantizer
    x = torch.randn(4, 6)
    started = quantizer.log_step.detach().clone()
    model(x * 100, EDGES)
    assert torch.equal(quantizer.log_step, started)
    steps = quantizer.input_codes(None).step
    assert steps.shape == (4,)
    assert (steps > 0).all()
    weight = quantizer.weight_codes(model.first.lin.weight.detach())
    error = (weight.dequantize() - model.first.lin.weight).abs().max().item()
    assert error < 0.5 * model.first.lin.weight.abs().max().item()
    zero = GCNConv(2, 2, scheme="a2q", num_nodes=4)
    assert torch.isfinite(zero(torch.zeros(4, 2), EDGES)).all()  # rows without values


def test_a2q_layer_is_the_formula():
    torch.manual_seed(1)
    layer, x = GCNConv(6, 3, scheme="a2q", num_nodes=4), torch.randn(4, 6)
    layer(x, EDGES)
    codes, (step, bits) = layer.quantizer.input_codes(x), layer.operand_quantizer.codes()
    x_q = torch.stack(
        [quantized(row, s, b) for row, s, b in zip(x, codes.step.tolist(), codes.bits.tolist(), strict=True)]
    )
    product = x_q @ layer.quantizer.weight_codes(layer.lin.weight.detach()).dequantize().t()
    graph = Graph.from_edge_index(EDGES, 4).with_self_loops
    factor = graph.inv_sqrt_degree.unsqueeze(1)
    columns = zip((product * factor).t(), step.tolist(), bits.tolist(), strict=True)
    operand = torch.stack([quantized(column, s, b) for column, s, b in columns], 1)
    dense = torch.zeros(4, 4).index_put_(
        (graph.rows.long(), graph.indices.long()), torch.ones(graph.num_edges), accumulate=True
    )
    torch.testing.assert_close(layer(x, EDGES), factor * (dense @ operand) + layer.bias)


def quantized(x: torch.Tensor, step: float, bits: int) -> torch.Tensor:
    """A2Q eq. 1 with signed codes."""
    top = max(0, 2 ** (bits - 1) - 1) if bits else 0
    return torch.sign(x) * step * torch.clamp_max(torch.floor(x.abs() / step + 0.5), top)


def test_a2q_state_dict_restores_behaviour():
    model, x = a2q_model(), torch.randn(4, 6)
    with torch.no_grad():
        model.first.quantizer.bits.copy_(torch.tensor([1.0, 2.0, 3.0, 8.0]))
    other = TwoLayers("a2q", 4)
    other.load_state_dict(model.state_dict())
    assert other.second.quantizer.kind == "unsigned"
    assert torch.equal(other(x, EDGES), model(x, EDGES))  # nothing starts anew
    assert torch.equal(other.first.quantizer.bits, model.first.quantizer.bits)


# warm-up ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "dq-int4", "a2q"])
def test_warm_up_is_float_and_steps_start_after_it(scheme):
    torch.manual_seed(2)
    model, exact, x = TwoLayers(scheme, 4), TwoLayers("fp32"), torch.randn(4, 6)
    exact.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    set_enabled(model, False)
    assert torch.equal(model(x, EDGES), exact(x, EDGES))
    assert {m.quantizer.kind for m in (model.first, model.second)} == {"new"}
    maps = feature_maps(model, 4)
    assert {m.bits for m in maps} == {32}
    assert averages(maps).average_bits == 32
    set_enabled(model, True)
    assert not torch.equal(model(x, EDGES), exact(x, EDGES))
    assert {m.quantizer.kind for m in (model.first, model.second)} == {"signed", "unsigned"}


# bookkeeping --------------------------------------------------------------------------------------------------------------------------


def test_averages_by_hand():
    maps = [
        FeatureMap("a.input", 100, 4, 1, "input", False),  # 0/1: exact in 1 bit, not quantized
        FeatureMap("a.operand", 10, 4, 4, "operand", True),
        FeatureMap("b.input", 10, 4, torch.tensor([1, 1, 2, 4], dtype=torch.uint8), "input", True, True),  # mean 2
        FeatureMap("b.operand", 3, 4, 4, "operand", True),
        FeatureMap("c.input", 30, 4, torch.tensor([0, 0, 0, 4], dtype=torch.uint8), "input", True, True),  # mean 1
        FeatureMap("d.input", 5, 4, 32, "input", False),
    ]
    got = averages(maps)
    assert got.average_bits == pytest.approx((2 + 1) / 2)
    assert got.average_bits_dim == pytest.approx((10 * 2 + 30 * 1) / 40)
    assert got.average_bits_all == pytest.approx(
        (100 * 1 + 10 * 4 + 10 * 2 + 3 * 4 + 30 * 1 + 5 * 32) / (100 + 10 + 10 + 3 + 30 + 5)
    )
    assert got.compression == pytest.approx(32 * 40 / 50)
    # 4 nodes: 40 * 4 elements in 50 * 4 bits, and a 32-bit step for each node of two maps
    assert got.compression_with_steps == pytest.approx(32 * 160 / (200 + 2 * 4 * 32))


def test_averages_of_an_unquantized_model():
    maps = feature_maps(TwoLayers("fp32"), 4)
    got = averages(maps)
    assert (
        got.average_bits,
        got.average_bits_dim,
        got.average_bits_all,
        got.compression,
        got.compression_with_steps,
    ) == (32, 32, 32, 1, 1)
    assert [(m.name, m.dim, m.nodes) for m in maps] == [
        ("first.input", 6, 4),
        ("first.operand", 8, 4),
        ("second.input", 8, 4),
        ("second.operand", 3, 4),
    ]


def test_feature_maps_of_a_quantized_model():
    model = TwoLayers("int8")
    model((torch.rand(4, 6) > 0.5).float(), EDGES)
    maps = feature_maps(model, 4)
    assert [(m.name, m.dim, m.bits, m.quantized) for m in maps] == [
        ("first.input", 6, 1, False), ("first.operand", 8, 8, True), ("second.input", 8, 8, True), ("second.operand", 3, 8, True),
    ]  # fmt: skip
    assert averages(maps).average_bits == 8
    # one step for the whole map: 8 bits an element and 32 once
    assert averages(maps).compression_with_steps == pytest.approx(32 * 32 / (8 * 32 + 32))
    assert [m.name for m in feature_maps(GCNConv(2, 2), 4)] == ["model.input", "model.operand"]
    assert [m.name for m in feature_maps(Linear(2, 2, scheme="int8"), 4)] == ["model.input"]


def test_widths_of_a2q_maps_are_rounded():
    model = a2q_model()
    model.second.quantizer.bits.data = torch.tensor([0.4, 1.6, 2.5, 11.0])
    maps = {m.name: m for m in feature_maps(model, 4)}
    assert maps["second.input"].bits.tolist() == [0, 2, 2, 8]
    assert maps["second.input"].learned
    assert maps["second.operand"].bits == 4
    assert math.isclose(maps["second.input"].mean_bits(), 3.0)


def test_nqat_keeps_elements_of_the_weight_at_random_in_training_only() -> None:
    """With noise 0.5 about half of the elements stay as they are: 4,096 draws, so 0.5 within six standard deviations of 1/128 each."""
    torch.manual_seed(0)
    layer = QATQuantizer(64, 64, parse("nqat-int4"))
    weight, eye = torch.randn(64, 64), torch.eye(64)
    layer.see_input(torch.rand(3, 64))
    layer.kind = "binary"  # the input passes as it is, so the product with the identity is the weight
    first, second = layer.linear(eye, weight), layer.linear(eye, weight)
    kept = (first == weight.t()).float().mean()
    assert abs(float(kept) - 0.5) < 6 / 128
    assert not torch.equal(first, second), "drawn anew in every step"
    layer.eval()
    codes = layer.weight_codes(weight)
    assert torch.equal(layer.linear(eye, weight), codes.dequantize().t())
