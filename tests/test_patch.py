"""PyTorch Geometric's own functions, with the patch and without: the same values, gradients and errors, and nothing left behind."""

import copy
import importlib
import inspect
import threading
import warnings

import pytest
import torch
import torch_geometric.nn.aggr.base
import torch_geometric.utils
from torch_geometric import EdgeIndex
from torch_geometric.nn import GATConv, GCNConv, GINConv, GraphConv, MessagePassing, SAGEConv, SGConv
from torch_geometric.utils import scatter, segment, softmax, spmm

import qgnn
from qgnn import patch, pyg_ops

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Sums of at most 40 normal numbers in another order, or in float32 where torch adds in 16 bits: a few roundings of values up to about 30.
TOLERANCE = {torch.float16: 0.1, torch.bfloat16: 0.8, torch.float32: 1e-4, torch.float64: 1e-12}

_before = scatter  # an alias from before the patch


@pytest.fixture(autouse=True)
def everything_on_kernels(monkeypatch):
    """Here small calls run on our kernels too."""
    monkeypatch.setattr(patch, "SMALLEST", dict.fromkeys(patch.SMALLEST, (0, 0)))


def on_kernels(name, calls=1):
    report = qgnn.patch_pyg.report()
    assert report[name]["kernels"] >= calls, report


def reasons(name):
    return set(qgnn.patch_pyg.report()[name]["pyg"])


def graph(nodes=30, edges=200, seed=0):
    torch.manual_seed(seed)
    return torch.randint(nodes, (2, edges))


def compare(function, *operands, name, tolerance=1e-4):
    """Values and gradients of ``function(*operands)`` with the patch, which it has to use, against those without."""
    results = []
    for patched in (False, True):
        leaves = [o.detach().clone().requires_grad_(o.is_floating_point()) for o in operands]
        with qgnn.patch_pyg() if patched else warnings.catch_warnings():
            out = function(*leaves)
            torch.manual_seed(1)
            if out.is_floating_point():
                out.backward(torch.randn(out.shape).to(out.dtype))
            if patched:
                on_kernels(name)
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.is_floating_point())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        assert got.dtype == expected.dtype


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduce", ["sum", "add", "mean", "min", "max", "mul"])
def test_scatter(reduce, dtype):
    index = graph()[1]
    src = torch.randn(200, 5).to(dtype)
    if reduce == "mul":  # with zeros, one and two in a group
        src = src.round() / 2
    compare(lambda x: scatter(x, index, 0, 30, reduce), src, name="scatter", tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("reduce", ["min", "max"])
def test_ties_share_the_gradient_as_torch_does(reduce):
    # torch counts the zero it starts from among equals that are zero, so these lose a part of their gradient.
    src = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, -1.0], [2.0, 2.0]])
    compare(lambda x: scatter(x, torch.tensor([0, 0, 0, 2]), 0, 4, reduce), src, name="scatter", tolerance=0)


@pytest.mark.parametrize(
    ("shape", "dim"), [((200,), 0), ((200,), -1), ((3, 200, 4), 1), ((3, 200, 4), -2), ((2, 200), -1)]
)
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_scatter_along_any_dimension(shape, dim, reduce):
    index = graph()[1]
    compare(lambda x: scatter(x, index, dim, reduce=reduce), torch.randn(shape), name="scatter")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("reduce", ["sum", "min", "max", "mul"])
def test_scatter_of_integers(reduce, dtype):
    src = torch.randint(-9, 9, (200, 3), dtype=dtype)
    compare(lambda x: scatter(x, graph()[1], 0, 30, reduce), src, name="scatter", tolerance=0)


def test_nan_and_infinity():
    src = torch.randn(200, 4)
    src[3, 1], src[7, 2], src[9, 3] = torch.nan, torch.inf, -torch.inf
    index, ptr = graph()[1], torch.tensor([0, 5, 5, 20, 200])
    with qgnn.patch_pyg():
        ours = [
            f(src, r)
            for f in (lambda x, r: scatter(x, index, 0, 30, r), lambda x, r: segment(x, ptr, r))
            for r in ("sum", "max", "min")
        ]
    theirs = [
        f(src, r)
        for f in (lambda x, r: scatter(x, index, 0, 30, r), lambda x, r: segment(x, ptr, r))
        for r in ("sum", "max", "min")
    ]
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduce", ["sum", "mean", "min", "max"])
def test_segment(reduce, dtype):
    ptr = torch.tensor([0, 0, 7, 40, 40, 100])
    for shape in ((100, 3), (100, 2, 3), (100,)):
        src = torch.randn(shape).to(dtype)
        expected = segment(src, ptr, reduce)
        with qgnn.patch_pyg():
            got = segment(src, ptr, reduce)
            on_kernels("segment")
            if reduce in ("min", "max"):  # torch shares the gradient of ties by the sign of the gradient
                segment(src.requires_grad_(), ptr, reduce)
                assert reasons("segment") == {"gradient of ties"}
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        if reduce in ("sum", "mean"):
            compare(lambda x: segment(x, ptr, reduce), src, name="segment", tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "dim"), [((200,), 0), ((200, 4), 0), ((200, 2, 3), 0), ((4, 200), -1)])
def test_softmax(shape, dim, dtype):
    index = graph()[1]
    src = torch.randn(shape).to(dtype)
    compare(lambda x: softmax(x, index, num_nodes=30, dim=dim), src, name="softmax", tolerance=TOLERANCE[dtype] / 10)
    if dim == 0:
        ptr = torch.tensor([0, 0, 50, 200])
        compare(lambda x: softmax(x, ptr=ptr), src, name="softmax", tolerance=TOLERANCE[dtype] / 10)


def test_softmax_of_masked_groups():
    src = torch.randn(6, 1)
    src[:3] = -torch.inf
    index = torch.tensor([0, 0, 0, 1, 1, 2])
    expected = softmax(src, index)
    with qgnn.patch_pyg():
        torch.testing.assert_close(softmax(src, index), expected, equal_nan=True)
    assert "scores of -inf or NaN" in reasons("softmax")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduce", ["sum", "mean", "min", "max"])
def test_spmm(reduce, dtype):
    dense = torch.randn(6, 8, dtype=dtype) * (torch.rand(6, 8) > 0.5)
    dense[2] = 0
    adj = dense.to_sparse_csr()
    other = torch.randn(8, 5, dtype=dtype)
    expected = spmm(adj, other, reduce)
    with qgnn.patch_pyg():
        torch.testing.assert_close(spmm(adj, other, reduce), expected)
        on_kernels("spmm")
        if reduce in ("min", "max"):
            spmm(adj, other.requires_grad_(), reduce).sum().backward()
            assert reasons("spmm") == {"gradient of ties"}
    if reduce in ("sum", "mean"):
        compare(lambda x: spmm(adj, x, reduce), other, name="spmm")


def test_spmm_leaves_other_matrices_to_pyg():
    dense = torch.randn(4, 4)
    with qgnn.patch_pyg(), pytest.warns(UserWarning, match="Converting sparse tensor"):
        torch.testing.assert_close(spmm(dense.to_sparse_coo(), dense), dense @ dense)
        torch.testing.assert_close(spmm(dense.to_sparse_csc(), dense), dense @ dense)
        adj = dense.to_sparse_csr().requires_grad_()
        spmm(adj, dense).sum().backward()
        assert adj.grad is not None
        with pytest.raises(ValueError, match="not supported"):
            spmm(adj, dense, "mul")
    assert qgnn.patch_pyg.report()["spmm"]["kernels"] == 0 and len(reasons("spmm")) == 4


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_edge_index(reduce, transpose, weighted):
    torch.manual_seed(0)
    edges = torch.stack([torch.randint(6, (40,)), torch.randint(8, (40,))])
    shape = (8, 8) if transpose else (6, 8)  # PyG's own gradient of a transposed matrix takes square ones only
    adj = EdgeIndex(edges, sparse_size=shape).sort_by("col" if transpose else "row").values
    x = torch.randn(8, 5)
    value = torch.rand(40) if weighted else None
    operands = (x, value) if weighted else (x,)
    compare(lambda *o: adj.matmul(*o, reduce=reduce, transpose=transpose), *operands, name="EdgeIndex.matmul")
    if not transpose and not weighted and reduce == "sum":
        expected = adj.matmul(x)
        with qgnn.patch_pyg():
            torch.testing.assert_close(adj @ x, expected)
            on_kernels("EdgeIndex.matmul")


CONVS = {
    "GCN": lambda: GCNConv(6, 4),
    "GCN, no normalisation": lambda: GCNConv(6, 4, normalize=False),
    "GCN, mean": lambda: GCNConv(6, 4, aggr="mean"),
    "GraphConv": lambda: GraphConv(6, 4),
    "GIN": lambda: GINConv(torch.nn.Linear(6, 4), train_eps=True),
    "SAGE": lambda: SAGEConv(6, 4),
    "SAGE, max": lambda: SAGEConv(6, 4, aggr="max"),
    "GAT": lambda: GATConv(6, 4, heads=2),
}


@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize("name", CONVS)
def test_layers(name, flow):
    torch.manual_seed(0)
    layer = CONVS[name]()
    layer.flow = flow
    edge_index = graph()
    function = "scatter" if name in ("SAGE, max", "GAT") else "MessagePassing.propagate"
    compare(lambda x: layer(x, edge_index), torch.randn(30, 6), name=function)
    if name != "GAT":
        compare(lambda x: layer(x, edge_index), torch.randn(3, 30, 6), name="scatter")
    if name in ("GraphConv", "GCN, no normalisation"):
        compare(lambda x, w: layer(x, edge_index, w), torch.randn(30, 6), torch.rand(200), name=function)


@pytest.mark.parametrize("kind", [GATConv, SAGEConv, GraphConv])
@pytest.mark.parametrize("second", [True, False])
def test_bipartite(kind, second):
    torch.manual_seed(0)
    layer = kind((6, 3), 4)
    edge_index = torch.stack([torch.randint(30, (90,)), torch.randint(12, (90,))])
    name = "softmax" if kind is GATConv else "MessagePassing.propagate"
    if second:
        compare(lambda a, b: layer((a, b), edge_index), torch.randn(30, 6), torch.randn(12, 3), name=name)
    else:
        compare(lambda a: layer((a, None), edge_index, size=(30, 12)), torch.randn(30, 6), name=name)


def test_layer_made_and_used_only_with_the_patch():
    class Own(MessagePassing):
        def forward(self, x, edge_index):
            return self.propagate(edge_index, x=x)

    x, edge_index = torch.randn(30, 3), graph()
    with qgnn.patch_pyg():
        layer = Own()
        out = layer(x, edge_index)
        on_kernels("MessagePassing.propagate")
    torch.testing.assert_close(layer(x, edge_index), out)


def own_sum():
    class Own(MessagePassing):
        def forward(self, x, edge_index):
            return self.propagate(edge_index, x=x)

    return Own()


def own_double():
    class Own(MessagePassing):
        def forward(self, x, edge_index):
            return self.propagate(edge_index, x=x)

        def message(self, x_j):
            return 2 * x_j

    return Own()


def test_two_classes_of_one_name():
    x, edge_index = torch.randn(30, 3), graph()
    layers = own_sum(), own_double()
    functions = [type(layer)._jinja_propagate for layer in layers]
    before, expected = [f.__code__ for f in functions], [layer(x, edge_index) for layer in layers]
    with qgnn.patch_pyg():
        for layer, out in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer(x, edge_index), out)
    assert all(f.__code__ is code for f, code in zip(functions, before, strict=True))


@pytest.mark.parametrize("what", ["hooks", "explain", "decomposed", "instance", "own"])
def test_layers_that_do_more_run_as_pyg_has_them(what):
    torch.manual_seed(0)
    x, edge_index, layer = torch.randn(30, 6), graph(), GCNConv(6, 4)
    messages = []
    if what == "hooks":
        layer.register_message_forward_hook(lambda *a: messages.append(a[-1]))
    elif what == "explain":
        layer.normalize, layer.explain, layer._edge_mask = False, True, torch.randn(200)
    elif what == "decomposed":
        layer.decomposed_layers = 2
    elif what == "instance":
        layer.message = lambda x_j, edge_weight: 2 * x_j
    else:
        layer.__class__ = type("Loud", (GCNConv,), {"message": lambda self, x_j, edge_weight: 3 * x_j})
    expected = layer(x, edge_index)
    count = len(messages)
    with qgnn.patch_pyg():
        torch.testing.assert_close(layer(x, edge_index), expected, rtol=1e-4, atol=1e-5)
        assert qgnn.patch_pyg.report().get("MessagePassing.propagate", {"kernels": 0})["kernels"] == 0
        on_kernels("scatter")
    assert len(messages) == 2 * count


def test_changes_in_place_are_seen():
    x, edge_index = torch.randn(30, 6), graph()
    layer = SAGEConv(6, 4)
    changes = [
        lambda e: e.copy_(graph(seed=1)),
        lambda e: e[1].add_(1).remainder_(30),
        lambda e: e.data.copy_(graph(seed=2)),
        lambda e: e.numpy().__setitem__((1, slice(None)), graph(seed=3)[1].numpy()),
        lambda e: e.set_(graph(seed=4)),
    ]
    with qgnn.patch_pyg():
        for change in [lambda e: None, *changes]:
            change(edge_index)
            fresh = edge_index.clone()
            torch.testing.assert_close(
                layer(x, edge_index), layer.double()(x.double(), fresh).float(), rtol=1e-4, atol=1e-5
            )
            layer.float()
            expected = torch.zeros(30, 6).index_add(0, fresh[1], x[fresh[0]])
            torch.testing.assert_close(scatter(x[edge_index[0]], edge_index[1], 0, 30), expected)
        with torch.inference_mode():
            edges = graph(seed=5)
            first = scatter(x[edges[0]], edges[1], 0, 30)
            edges[1] = edges[1].flip(0)
            assert not torch.equal(scatter(x[edges[0]], edges[1], 0, 30), first)


def test_a_gpu_asks_for_versions_instead(monkeypatch):
    compared = []
    monkeypatch.setattr(pyg_ops, "_waits", lambda tensor: True)
    monkeypatch.setattr(
        pyg_ops, "_same_content", lambda t, c, same=pyg_ops._same_content: compared.append(0) or same(t, c)
    )
    src, indices = torch.randn(200, 4), [graph(seed=seed)[1] for seed in range(2)]

    def check():
        for index in indices:
            torch.testing.assert_close(scatter(src, index, 0, 30), torch.zeros(30, 4).index_add(0, index, src))

    with qgnn.patch_pyg():
        check()
        assert compared  # another tensor of that shape
        compared.clear()
        check()
        assert not compared
        indices[0].copy_(indices[1])
        check()


def test_graphs_made_in_inference_are_of_use_in_training():
    torch.manual_seed(0)
    edge_index = torch.randint(5, (2, 9))
    x, weight = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((5, 2), (9,)))
    layer = GraphConv(2, 2).double()
    calls = [lambda: layer(x, edge_index, weight), lambda: softmax(x[edge_index[0]], edge_index[1], num_nodes=5)]
    expected = []
    for patched in (False, True):
        with qgnn.patch_pyg() if patched else warnings.catch_warnings():
            for call in calls:
                with torch.inference_mode():
                    call()
                (grad,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
                expected.append(torch.autograd.grad(grad.square().sum(), x)[0])
    for theirs, ours in zip(expected[:2], expected[2:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_graph_is_built_once_for_equal_edges(monkeypatch):
    built = []
    monkeypatch.setattr(patch, "directed", lambda *a, build=patch.directed: built.append(0) or build(*a))
    layer, x = GCNConv(6, 4), torch.randn(30, 6)
    with qgnn.patch_pyg():
        for _ in range(3):
            layer(x, graph())  # gcn_norm makes new tensors of the same edges each time
        assert len(built) == 1
        layer(x, graph(seed=1))
        assert len(built) == 2


def test_no_tensor_is_kept_alive():
    import weakref

    index, src = graph()[1].clone(), torch.randn(200, 4)
    with qgnn.patch_pyg():
        scatter(src, index, 0, 30)
        gone = weakref.ref(index)
        del index
        assert gone() is None


def test_everything_is_restored_to_identical_objects():
    GCNConv(2, 2)
    functions = [scatter, segment, softmax, spmm, torch_geometric.edge_index._spmm, GCNConv.propagate]
    functions.append(MessagePassing._set_jittable_templates)
    modules = [
        importlib.import_module(f"torch_geometric.utils._{name}") for name in ("scatter", "segment", "softmax", "spmm")
    ]
    before = [(f, f.__code__, f.__defaults__, copy.copy(f.__dict__)) for f in functions]
    names = [dict(vars(m)) for m in modules]
    for leave in (lambda p: p.restore(), lambda p: p.__exit__(None, None, None)):
        handle = qgnn.patch_pyg()
        assert all(f.__code__ is not code for f, code, *_ in before)
        leave(handle)
        handle.restore()  # nothing happens
        for f, code, defaults, attributes in before:
            assert f.__code__ is code and f.__defaults__ is defaults and f.__dict__ == attributes
    for module, was in zip(modules, names, strict=True):
        assert vars(module).keys() == was.keys() and all(vars(module)[k] is v for k, v in was.items())


def test_an_ended_patch_cannot_be_entered():
    handle = qgnn.patch_pyg()
    handle.restore()
    with pytest.raises(RuntimeError, match=r"has ended; call qgnn.patch_pyg\(\) again"), handle:
        pass


def test_nothing_is_held_after_a_failure(monkeypatch):
    code = scatter.__code__
    monkeypatch.setattr(patch, "spmm", None)
    with pytest.raises(AttributeError):
        qgnn.patch_pyg()
    assert scatter.__code__ is code
    monkeypatch.undo()
    with qgnn.patch_pyg():
        assert scatter.__code__ is not code


def test_every_alias_is_caught():
    index, src = torch.tensor([0, 1, 0]), torch.randn(3, 2)
    with qgnn.patch_pyg():
        from torch_geometric.utils import scatter as inside

        assert _before is inside is torch_geometric.nn.aggr.base.scatter
        _before(src, index)
        torch_geometric.nn.aggr.base.scatter(src, index)
        torch_geometric.utils.scatter(src, index, reduce="mean")
        on_kernels("scatter", 3)
    inside(src, index)
    on_kernels("scatter", 3)  # and none more
    assert qgnn.patch_pyg.report()["scatter"] == {"kernels": 3, "pyg": {}}


def test_nested_exceptions_and_threads():
    code = scatter.__code__
    with pytest.raises(RuntimeError, match="inside"), qgnn.patch_pyg():
        with qgnn.patch_pyg():
            assert scatter.__code__ is not code
        assert scatter.__code__ is not code
        raise RuntimeError("inside")
    assert scatter.__code__ is code
    src, index = torch.randn(200, 4), graph()[1]
    expected, failures = scatter(src, index, 0, 30), []

    def work():
        for _ in range(20):
            with qgnn.patch_pyg():
                if not torch.allclose(scatter(src, index, 0, 30), expected, atol=1e-5):
                    failures.append(0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and scatter.__code__ is code


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda s, i: scatter(s, i, 0, 30, "any"), "reduce='any'"),
        (lambda s, i: scatter(s.to(torch.uint8), i, 0, 30), "torch.uint8"),
        (lambda s, i: scatter(s.long(), i, 0, 30, "mean"), "torch.int64"),
        (lambda s, i: scatter(s.to(torch.complex64), i, 0, 30), "torch.complex64"),
        (lambda s, i: scatter(s[:0], i[:0], 0, 30), "empty"),
        (lambda s, i: scatter(s[:, :0], i, 0, 30), "empty"),
        (lambda s, i: scatter(s, i[:1], 0, 30), "index of another length"),
        (lambda s, i: torch.func.vmap(lambda x: scatter(x, i, 0, 30))(s.t()), "torch.func transform"),
        (lambda s, i: torch.func.jvp(lambda x: scatter(x, i, 0, 30), (s,), (s,))[1], "torch.func transform"),
    ],
)
def test_what_goes_to_pyg_and_why(call, reason):
    torch.manual_seed(0)
    src, index = torch.randn(200, 4), graph()[1]
    expected = call(src, index)
    with qgnn.patch_pyg():
        got = call(src, index)
    torch.testing.assert_close(got, expected)
    assert reasons("scatter") == {reason} and qgnn.patch_pyg.report()["scatter"]["kernels"] == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda s, i: scatter(s, i.view(-1, 1)),
        lambda s, i: scatter(s, i, 2),
        lambda s, i: scatter(s, i, 0, 30, "std"),
        lambda s, i: scatter(s, i, 0, 3),
        lambda s, i: scatter(s, -i - 1, 0, 30),
        lambda s, i: scatter(s, i[:7], 0, 30),
        lambda s, i: softmax(s),
        lambda s, i: softmax(s, ptr=torch.tensor([0, 200]), dim=1),
        lambda s, i: segment(s, torch.tensor([[0, 200]])),
        lambda s, i: spmm(s, s),
        lambda s, i: GCNConv(4, 2)(s, torch.stack([i + 180, i])),
        lambda s, i: GCNConv(4, 2, normalize=False)(s, torch.stack([i - 1, i])),
        lambda s, i: SAGEConv(4, 2)(s, torch.stack([i, i]), size=(3, 3)),
        lambda s, i: SGConv(4, 2).propagate(torch.stack([i, i]), x=s, edge_weight=None),
        lambda s, i: SAGEConv(4, 2)((s, None), torch.stack([i, i + 9]), size=(200, 30)),
    ],
)
def test_errors_are_those_of_pyg(call):
    src, index = torch.randn(200, 4), graph()[1]
    with pytest.raises(Exception) as expected:
        call(src, index)
    with qgnn.patch_pyg(), pytest.raises(expected.type) as got:
        call(src, index)
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, e, w: scatter(x[e[0]] * w[:, None], e[1], 0, 5, "mean"), "scatter"),
        (lambda x, e, w: scatter(x[e[0]] * w[:, None], e[1], 0, 5, "max"), "scatter"),
        (lambda x, e, w: scatter(x[e[0]] * w[:, None], e[1], 0, 5, "mul"), "scatter"),
        (lambda x, e, w: softmax(x[e[0]] * w[:, None], e[1], num_nodes=5), "softmax"),
        (lambda x, e, w: GraphConv(2, 2).double().requires_grad_(False)(x, e, w), "MessagePassing.propagate"),
    ],
)
def test_double_backward(call, name):
    torch.manual_seed(0)
    edge_index = torch.randint(5, (2, 9))
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(9, dtype=torch.float64, requires_grad=True)

    def seeded(x, w):
        torch.manual_seed(0)
        return call(x, edge_index, w)

    with qgnn.patch_pyg():
        assert torch.autograd.gradcheck(seeded, (x, weight))
        assert torch.autograd.gradgradcheck(seeded, (x, weight))
        assert "double backward" in reasons(name)


def test_compile_script_and_trace_read_pygs_own_source():
    source = inspect.getsource(scatter)
    x, edge_index, layer = torch.randn(30, 6), graph(), GCNConv(6, 4)
    expected = layer(x, edge_index)
    with qgnn.patch_pyg(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        assert inspect.getsource(scatter) == source
        assert list(inspect.signature(scatter).parameters) == ["src", "index", "dim", "dim_size", "reduce"]
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        for run in (torch.jit.script(layer), compiled, torch.export.export(layer, (x, edge_index)).module()):
            torch.testing.assert_close(run(x, edge_index), expected)
        assert reasons("MessagePassing.propagate") == {"torch.compile or torch.export"}
        traced = torch.jit.trace(lambda s, i: scatter(s, i, 0, 30), (x[:3], edge_index[1, :3]), check_trace=False)
        assert "scatter_add" in str(traced.graph)


def test_autocast_and_inference():
    src, index = torch.randn(200, 4), graph()[1]
    with torch.autocast("cpu", torch.bfloat16):
        expected = softmax(src, index), scatter(src.bfloat16(), index, 0, 30)
        with qgnn.patch_pyg():
            got = softmax(src, index), scatter(src.bfloat16(), index, 0, 30)
            assert reasons("softmax") == {"autocast"}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    with torch.inference_mode(), qgnn.patch_pyg():
        torch.testing.assert_close(scatter(src, index, 0, 30), torch.zeros(30, 4).index_add(0, index, src))


def test_small_calls_go_to_pyg(monkeypatch):
    monkeypatch.undo()
    with qgnn.patch_pyg():
        scatter(torch.randn(5, 2), torch.tensor([0, 1, 0, 1, 1]))
        assert qgnn.patch_pyg.report()["scatter"] == {"kernels": 0, "pyg": {"small": 1}}
        scatter(torch.randn(20_000, 16), torch.randint(500, (20_000,)))
        on_kernels("scatter")


def test_two_runs_give_the_same_bits():
    src, index = torch.randn(5000, 8), torch.randint(50, (5000,))
    with qgnn.patch_pyg():
        assert torch.equal(scatter(src, index, 0, 50), scatter(src, index, 0, 50))
