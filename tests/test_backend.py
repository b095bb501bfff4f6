"""The pipeline end to end on plain modules: the dense limit, sparse runs, modes of torch, options, and faults in every stage."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import spt_compiler
from spt_compiler import OptionError, SPTConfig, SPTError, debug
from spt_compiler import backend as backend_module
from tests.blocks import EXACT, SPARSE, Block, Broken, Stack, assert_same, gradients, relative


def batch(length: int = 100, size: int = 2) -> torch.Tensor:
    return torch.randn(size, length, 48)


def compiled(module, options=SPARSE, **more):
    return torch.compile(module, backend="spt", options={**options, **more})


def warmed(module, options=SPARSE, **more):
    """Compiled, with initialised state."""
    run = compiled(module, options, **more)
    with torch.no_grad():
        for _ in range(3):
            run(batch())
    return run


# ---- the dense limit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_exact_equals_eager(inner, checkpointed, causal):
    model, x = Stack(2, checkpointed=checkpointed, causal=causal), batch(63)
    expected = gradients(model, model, x)
    assert_same(gradients(model, compiled(model, EXACT, inner=inner), x), expected)


class Chained(nn.Module):
    """Sites that read each other's results, with nothing in between."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, x):
        for _ in range(2):
            x = nn.functional.scaled_dot_product_attention(x, x, x)
        for _ in range(2):
            x = self.down(nn.functional.gelu(self.up(x)))
        return x


def test_a_site_may_read_the_result_of_another():
    model, x = Chained(), batch(63)
    assert spt_compiler.explain(model, x, options=EXACT).replaced() == 4
    expected = gradients(model, model, x)
    assert_same(gradients(model, compiled(model, EXACT, strict=True), x), expected)


def test_each_site_of_a_model_on_several_devices_gets_state_on_its_own():
    """Naive model parallelism in one graph, with "meta" as the second device."""
    model, x = Stack(2), batch(63)
    model.blocks[1].to("meta")
    found = []

    def capture(gm, example_inputs):
        prepared = backend_module.prepare_graph(gm, example_inputs, SPTConfig.from_options(SPARSE))
        states = iter(backend_module._example_states(prepared))
        for binding in prepared.bindings:
            devices = {next(states).device for _ in binding.spec.inputs}
            found.append((example_inputs[binding.anchor].device, devices))
        return gm.forward

    def run(x):
        return model.blocks[1](model.blocks[0](x).to("meta"))

    torch.compile(run, backend=capture)(x)
    assert found == [(d, {d}) for d in map(torch.device, ("cpu", "cpu", "meta", "meta"))]


class Shared(nn.Module):
    """One set of weights for the values of all rows of the batch."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(48, 144)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q[:1], k[:1], v)


def test_values_of_more_rows_than_queries_stay_dense():
    model, x = Shared(), batch(63)
    (site,) = spt_compiler.explain(model, x, options=EXACT).sites
    assert site.status == "skipped" and "batch sizes of queries (1,) and values (2,) differ" in site.reason
    assert_same(gradients(model, compiled(model, EXACT, inner="eager"), x), gradients(model, model, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exact_in_other_dtypes(dtype):
    model, x = Stack(1).to(dtype), batch(63).to(dtype)
    expected = gradients(model, model, x)
    tolerance = 1e-10 if dtype == torch.float64 else 3e-2
    assert_same(gradients(model, compiled(model, EXACT), x), expected, tolerance, tolerance)


def test_exact_runs_the_sparse_operators():
    """Never a shortcut to the dense path: the graph that runs holds our operators and no dense attention."""
    seen = []

    def spy(gm, inputs):
        seen.append({str(n.target) for n in gm.graph.nodes if n.op == "call_function"})
        return gm.forward

    model = Stack(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_module, "inner_compiler", lambda config, mode=None: spy)
        compiled(model, EXACT)(batch())
    (targets,) = seen
    assert {
        "spt.select_tiles_v1.default",
        "spt.tile_attention_v1.default",
        "spt.route_v1.default",
        "spt.routed_ffn_v1.default",
    } <= targets
    assert not any("scaled_dot_product" in t or "gelu" in t for t in targets)


def test_exact_holds_after_learning_permuted_the_blocks():
    model = Stack(1)
    run = compiled(model)
    for _ in range(3):
        run(batch()).square().mean().backward()
    name = "blocks.0.fc1/ffn/0.permutation"
    assert not torch.equal(spt_compiler.state_dict(model)[name], torch.arange(112, dtype=torch.int32))
    torch._dynamo.reset()
    x = batch(63)
    expected = gradients(model, model, x)
    assert_same(gradients(model, compiled(model, EXACT), x), expected)


def test_frozen_weights_get_no_gradient():
    model, x = Stack(1), batch(63)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    expected = gradients(model, model, x)
    got = gradients(model, compiled(model, EXACT), x)
    assert set(got[1]) == {n for n, p in model.named_parameters() if p.requires_grad} | {"input0"}
    assert_same(got, expected)


def test_dropout_is_honoured_and_replayed_under_checkpointing():
    torch.manual_seed(0)
    model, x = Stack(1, checkpointed=True, dropout=0.4), batch(63)
    run = compiled(model, EXACT)

    def seeded(*inputs):
        torch.manual_seed(5)
        return run(*inputs)

    out, grads = gradients(model, seeded, x)
    again, grads_again = gradients(model, seeded, x)
    assert torch.equal(out, again) and all(torch.equal(grads[n], grads_again[n]) for n in grads)
    torch.manual_seed(6)
    assert not torch.equal(run(x), out)
    # The same mask in forward and backward: the directional derivative agrees with finite differences.
    model.double()
    x = x.double()
    direction = torch.randn_like(x)

    def loss(value):
        torch.manual_seed(5)
        return run(value).square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    numeric = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
    assert relative((leaf.grad * direction).sum(), numeric.detach()) < 1e-5


# ---- sparse runs --------------------------------------------------------------------------------------------------


def test_the_first_step_is_dense_and_the_second_sparse():
    model, x = Stack(2), batch()
    dense = model(x)
    run = compiled(model)
    first = run(x)
    first.sum().backward()
    second = run(x)
    assert relative(first, dense) < 1e-5
    assert relative(second, dense) > 1e-3


def test_sparse_attention_leaks_neither_rows_nor_the_future():
    model = nn.Sequential(Block(hidden=112))
    run = warmed(model, **{"ffn.density": 1.0})
    x = batch(200)
    with torch.no_grad():
        out = run(x)
        other = x.clone()
        other[1] = torch.randn(200, 48)
        assert torch.equal(run(other)[0], out[0])
        late = x.clone()
        late[:, 128:] = torch.randn(2, 72, 48)  # query tiles are 64 wide: tiles 0 and 1 may not change
        changed = run(late)
        assert torch.equal(changed[:, :128], out[:, :128])
        assert not torch.equal(changed[:, 128:], out[:, 128:])


def test_masked_keys_never_leak():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.kv, self.proj = nn.Linear(48, 48), nn.Linear(48, 96), nn.Linear(48, 48)

        def forward(self, x, y, mask):
            split = lambda t: t.view(2, 130, 4, 12).transpose(1, 2)  # noqa: E731
            k, v = self.kv(y).chunk(2, -1)
            out = torch.nn.functional.scaled_dot_product_attention(split(self.q(x)), split(k), split(v), attn_mask=mask)
            return self.proj(out.transpose(1, 2).reshape(2, 130, 48))

    model = Masked()
    run = compiled(model)
    x, y = batch(130), batch(130)
    mask = torch.ones(2, 1, 1, 130, dtype=torch.bool)
    mask[0, ..., 90:] = False
    mask[1, ..., :17] = False
    with torch.no_grad():
        for _ in range(3):
            out = run(x, y, mask)
        poisoned = y.clone()
        poisoned[0, 90:] = 1e4
        poisoned[1, :17] = -1e4
        assert torch.equal(run(x, poisoned, mask), out)
        poisoned[1, 17:30] = 1e2
        assert not torch.equal(run(x, poisoned, mask)[1], out[1])


def test_sparse_gradients_are_those_of_the_sparse_function():
    model = Stack(1).double()
    run = warmed(model.float())
    model.double()
    x = batch(100).double()
    direction = torch.randn_like(x)
    with torch.no_grad():  # before the backward: after it learning is due, and the function another
        numeric = (run(x + 1e-7 * direction).square().sum() - run(x - 1e-7 * direction).square().sum()) / 2e-7
    leaf = x.clone().requires_grad_()
    run(leaf).square().sum().backward()
    assert relative((leaf.grad * direction).sum(), numeric) < 1e-4


def test_default_generators_are_left_alone():
    model, x = Stack(1), batch()
    run = compiled(model)
    before = torch.get_rng_state()
    for _ in range(3):
        run(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


# ---- shapes and modes of torch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tile", "token"])
def test_lengths_and_batches_share_one_dynamic_graph(granularity):
    from torch._dynamo.utils import counters

    model = Stack(1)
    run = torch.compile(model, backend="spt", options={**EXACT, "attention.granularity": granularity}, dynamic=True)
    counters.clear()
    # Several query tiles, one, and less than one: no derived size may make a graph of its own.
    for length, size in ((130, 2), (100, 3), (257, 4), (40, 2), (7, 3), (2, 2)):
        x = batch(length, size)
        assert_same(gradients(model, run, x), gradients(model, model, x))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("length", [1, 2, 15])
def test_lengths_below_a_tile(length):
    model, x = Stack(1), batch(length)
    expected = gradients(model, model, x)
    assert_same(gradients(model, compiled(model, EXACT), x), expected)
    run = warmed(model)
    assert run(x).isfinite().all()


def test_a_result_that_is_not_transposed_is_contiguous():
    """The operator lays its result out for the output projection; who reads it as it is may view it."""

    def attend(q, k, v):
        return (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v

    q, k, v = (torch.randn(2, 3, 40, 16) for _ in range(3))
    run = torch.compile(attend, backend="spt", options={**EXACT, "require_matches": 1})
    torch.testing.assert_close(run(q, k, v).view(6, -1), attend(q, k, v).view(6, -1))


def test_an_empty_batch():
    model = Stack(1)
    out = compiled(model, strict=False)(batch(16, 0))
    assert out.shape == (0, 16, 48)


@pytest.mark.parametrize("outside", [True, False])
def test_autocast(outside):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stack(1)

        def forward(self, x):
            if outside:
                return self.inner(x)
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    model, x = Cast(), batch(63)

    def call(function):
        def run(value):
            with torch.autocast("cpu", torch.bfloat16, enabled=outside):
                return function(value)

        return run

    expected = gradients(model, call(model), x)
    got = gradients(model, call(compiled(model, EXACT)), x)
    assert got[0].dtype == expected[0].dtype
    assert_same(got, expected, 3e-2, 6e-2)


def test_inference_mode_and_no_grad_agree():
    model, x = Stack(1).eval(), batch()
    run = warmed(model)
    with torch.no_grad():
        plain = run(x)
    with torch.inference_mode():
        assert torch.equal(run(x), plain)


def test_fullgraph_and_two_calls_in_one_step():
    model, x = Stack(1), batch(63)
    run = torch.compile(model, backend="spt", options=EXACT, fullgraph=True)
    both = lambda f: lambda a: f(a) + f(a * 0.5)  # noqa: E731
    assert_same(gradients(model, both(run), x), gradients(model, both(model), x))


def test_compiled_autograd_is_a_no_op_here():
    model, x = Stack(1), batch(63)
    expected = gradients(model, model, x)
    run = compiled(model, EXACT, inner="eager")
    with torch._dynamo.config.patch(compiled_autograd=True):
        assert_same(gradients(model, run, x), expected)


def test_inference_dense_keeps_graphs_without_gradients_dense():
    model, x = Stack(1), batch()
    run = compiled(model, inference="dense")
    for _ in range(2):
        run(x).sum().backward()
    assert relative(run(x), model(x)) > 1e-3
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert relative(run(x), model(x)) < 1e-6


@pytest.mark.parametrize("smallest", [0, 10**6])
def test_a_graph_in_which_nothing_is_replaced_is_compiled_as_it_is(monkeypatch, smallest):
    given, compiled_graphs = [], []

    def spy(gm, inputs):
        compiled_graphs.append((gm, len(inputs)))
        return gm.forward

    def backend(gm, inputs):
        given.append((gm, len(inputs)))
        options = {"attention.min_keys": smallest, "ffn.min_width": smallest}
        return backend_module.spt(gm, inputs, options=options)

    monkeypatch.setattr(backend_module, "inner_compiler", lambda config, mode=None: spy)
    model, x = Stack(1), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is sparse is what is asked for
        out = torch.compile(model, backend=backend)(x)
    ((graph, n_inputs),) = compiled_graphs
    if smallest:
        assert graph is given[0][0] and n_inputs == given[0][1]
        assert torch.equal(out, model(x))
    else:
        assert graph is not given[0][0] and n_inputs > given[0][1]


def test_second_order_gradients_are_refused_clearly():
    model, x = Stack(1), batch(40).requires_grad_()
    run = compiled(model, EXACT, inner="eager")
    (grad,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
    with pytest.raises(Exception, match="(?i)second|double|twice"):
        grad.sum().backward()


# ---- options and switches -----------------------------------------------------------------------------------------


def test_equal_options_do_not_recompile():
    from torch._dynamo.utils import counters

    model, x = Stack(1), batch()
    compiled(model)(x)
    counters.clear()
    compiled(model)(x)
    assert counters["stats"]["unique_graphs"] == 0
    compiled(model, **{"attention.density": 0.5})(x)
    assert counters["stats"]["unique_graphs"] == 1


def test_unknown_option_reaches_the_user():
    with pytest.raises(Exception, match="attention.density") as caught:
        compiled(Stack(1), **{"attention.densty": 0.5})(batch())
    assert isinstance(caught.value, OptionError) or isinstance(
        getattr(caught.value, "inner_exception", None), OptionError
    )


def test_disabled_by_environment(monkeypatch):
    monkeypatch.setenv("SPT_DISABLE", "1")
    model, x = Stack(1), batch()
    run = compiled(model)
    for _ in range(3):
        assert relative(run(x), model(x)) < 1e-6
    assert spt_compiler.state_dict(model) == {}


def test_dense_context_runs_the_original_operators():
    model, x = Stack(1), batch()
    run = warmed(model)
    with spt_compiler.dense():
        assert torch.equal(run(x), model(x))
    assert not torch.equal(run(x), model(x))


def test_fuel_limits_the_rewrites():
    model, x = Stack(2), batch()
    for fuel in (0, 1, 3):
        found = spt_compiler.explain(model, x, options={**SPARSE, "fuel": fuel})
        assert found.replaced() == fuel
        assert sum(f"fuel = {fuel}" in s.reason for s in found.sites) == 4 - fuel


def test_site_overrides_reach_the_sites():
    model, x = Stack(2), batch()
    options = {**SPARSE, "sites": {"blocks.0*": {"attention.density": 0.5, "ffn.density": 0.25}}}
    found = {
        (s.path.split(".")[1] if s.path else "", s.kind): s.density
        for s in spt_compiler.explain(model, x, options=options).sites
    }
    assert found[("0", "attention")] == 0.5 and found[("1", "attention")] == 0.25
    assert found[("0", "ffn")] == 0.25 and found[("1", "ffn")] == 0.5


def glob_warnings(call):
    """What a call says about globs of `sites`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "match no site" in str(w.message)]


def test_a_glob_that_hits_nothing_warns_once():
    model = compiled(Stack(2), sites={"blocks.1*": {"ffn.density": 0.25}, "layers.*": {"ffn.density": 0.25}})
    (message,) = glob_warnings(lambda: model(batch()))
    assert "layers.*" in message and "blocks.1*" not in message
    assert not glob_warnings(lambda: model(batch()))


def test_globs_of_blocks_compiled_one_by_one_warn_about_the_users_own_only():
    model = spt_compiler.compile(Stack(2), **SPARSE, sites={"blocks.1*": {"ffn.density": 0.25}})
    assert not glob_warnings(lambda: model(batch()))


def test_a_mode_reaches_the_inner_compiler(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx",
        lambda gm, inputs, config_patches=None: seen.update(config_patches) or gm.forward,
    )
    torch.compile(Stack(1), backend="spt", mode="max-autotune-no-cudagraphs")(batch())
    assert seen["max_autotune"] is True


# ---- nothing matched ----------------------------------------------------------------------------------------------


def test_a_model_without_sites_warns():
    model = nn.Sequential(nn.Linear(48, 48), nn.Tanh())
    with pytest.warns(UserWarning, match="replaced nothing"):
        out = compiled(model)(batch())
    assert out.shape == (2, 100, 48)


def test_the_warning_names_the_nearest_misses():
    with pytest.warns(UserWarning, match="attention.min_keys = 5000"):
        compiled(Stack(1), **{"attention.min_keys": 5000, "ffn.min_width": 5000})(batch())


def test_require_matches_counts_over_all_graphs_of_a_call():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="spt_compiler")
        compiled(Broken(2), require_matches=4)(batch())
    run = compiled(Broken(2), require_matches=5)
    for _ in range(2):  # trying again does not help
        with pytest.raises(SPTError, match="4 site.*require_matches = 5"):
            run(batch())


# ---- faults -------------------------------------------------------------------------------------------------------

STAGES = [
    ("canonicalize", "spt_compiler.canonicalize.canonicalize"),
    ("match", "spt_compiler.patterns.find"),
    ("plan", "spt_compiler.backend.resolve"),
    ("rewrite", "spt_compiler.rewrite.Rewriter._attention"),
    ("rewrite", "spt_compiler.rewrite.Rewriter._ffn"),
    ("rewrite", "spt_compiler.rewrite.Rewriter.finish"),
]


def _explode(*_, **__):
    raise RuntimeError("injected")


@pytest.mark.parametrize("stage, target", STAGES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_fault_in_a_stage_leaves_the_model_dense_and_says_so(monkeypatch, stage, target, checkpointed):
    monkeypatch.setattr(target, _explode)
    model, x = Stack(1, checkpointed=checkpointed), batch(63)
    expected = gradients(model, model, x)
    with pytest.warns(UserWarning, match=f"stage {stage} failed at .*injected"):
        got = gradients(model, compiled(model, EXACT, strict=False), x)
    assert_same(got, expected)


@pytest.mark.parametrize("stage, target", STAGES)
def test_strict_raises(monkeypatch, stage, target):
    monkeypatch.setattr(target, _explode)
    with pytest.raises(Exception, match="injected") as caught:
        compiled(Stack(1))(batch())
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, SPTError) and error.stage == stage


def test_a_fault_of_one_site_leaves_the_others_replaced(monkeypatch):
    from spt_compiler.rewrite import Rewriter

    original, calls = Rewriter._attention, []

    def sometimes(self, plan):
        calls.append(plan)
        if len(calls) == 1:
            original(self, plan)  # half-way: nodes are emitted already
            raise RuntimeError("injected")
        return original(self, plan)

    monkeypatch.setattr(Rewriter, "_attention", sometimes)
    model, x = Stack(2), batch(63)
    expected = gradients(model, model, x)
    with pytest.warns(UserWarning, match=r"blocks.0.*injected"):
        got = gradients(model, compiled(model, EXACT, strict=False), x)
    assert_same(got, expected)


def test_an_inner_compiler_that_refuses_the_rewritten_graph(monkeypatch):
    real = backend_module.inner_compiler

    def picky(config, mode=None):
        inner = real(config, mode)

        def run(gm, inputs):
            if any("spt" in str(n.target) for n in gm.graph.nodes if n.op == "call_function"):
                raise RuntimeError("injected")
            return inner(gm, inputs)

        return run

    monkeypatch.setattr(backend_module, "inner_compiler", picky)
    model, x = Stack(1), batch(63)
    with pytest.warns(UserWarning, match="stage inner compiler failed.*injected"):
        assert relative(compiled(model, strict=False)(x), model(x)) < 1e-6


def test_nan_activations_poison_nothing():
    model, x = Stack(1), batch()
    run = compiled(model)
    for _ in range(3):
        run(x).sum().backward()
    before = spt_compiler.state_dict(model)
    bad = x.clone()
    bad[0, 7] = float("nan")
    for _ in range(4):
        run(bad).sum().backward()
    model.zero_grad()
    out = run(x)
    after = spt_compiler.state_dict(model)
    assert out.isfinite().all()
    assert all(
        t.isfinite().all()
        for n, t in after.items()
        if t.is_floating_point() and not n.endswith((".sample", ".quality"))
    )
    assert after["blocks.0.fc1/ffn/0.counters"][3] > 0  # skipped rows are counted
    assert not torch.equal(before["blocks.0.fc1/ffn/0.router_bias"], after["blocks.0.fc1/ffn/0.router_bias"])


def test_a_mask_of_the_wrong_shape_is_the_models_own_error():
    class Wrong(Block):
        def forward(self, x):
            q, k, v = self.qkv(x).view(2, 100, 3, 4, 12).permute(2, 0, 3, 1, 4).unbind(0)
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=torch.ones(7, 9, dtype=torch.bool)
            )

    with pytest.raises(RuntimeError, match="(?i)expand|size|shape"):
        compiled(Wrong())(batch())


def test_compensation_reaches_the_operator_and_lowers_the_error():
    """Small queries and keys: attention is nearly uniform, where dropped tiles weigh most and their means say most."""
    model, x = Stack(1), batch(200)
    with torch.no_grad():
        model.blocks[0].qkv.weight[:96] *= 0.1
    dense, dense_grads = gradients(model, model, x)
    options = {**SPARSE, "inner": "aot_eager", "attention.tile": [16, 8], "attention.density": 0.125, "ffn.density": 1.0}
    errors = {}
    for on in (False, True):
        torch._dynamo.reset()
        run = warmed(model, {**options, "attention.compensation": on})
        out, grads = gradients(model, run, x)
        errors[on] = relative(out, dense), relative(grads["input0"], dense_grads["input0"])
    assert errors[True][0] < 0.7 * errors[False][0] and errors[True][1] < errors[False][1]


def test_feed_forwards_below_the_break_even_stay_dense():
    """Of a CPU, by hidden width, and by tokens where the dense products are faster: in 16 bits."""
    from torch import nn

    def replaced(hidden: int, tokens: int, dtype: torch.dtype) -> tuple[int, str]:
        model = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 64)).to(dtype)
        found = spt_compiler.explain(model, torch.randn(1, tokens, 64, dtype=dtype), options={"inner": "eager"})
        return found.replaced("ffn"), found.sites[0].reason or ""

    assert replaced(1024, 512, torch.float32)[0] == 1
    assert replaced(1023, 512, torch.float32) == (0, "hidden width 1023 is below ffn.min_width = 1024, the break-even on cpu")
    assert replaced(1024, 511, torch.float32) == (0, "511 tokens a call are fewer than 512, the break-even on cpu")
    assert replaced(1024, 4096, torch.bfloat16)[0] == 1
    assert replaced(1024, 4095, torch.bfloat16) == (0, "4095 tokens a call are fewer than 4096, the break-even on cpu")


class Translator(torch.nn.Module):
    """A target mask that is given makes the decoder compare it with a causal one, on the host: the graph breaks there."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Transformer(32, 4, 2, 2, 64, 0.0, batch_first=True)

    def forward(self, source, target):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.inner(source, target, tgt_mask=mask)


def test_a_break_inside_of_torch_s_own_transformer_is_reported():
    inputs = torch.randn(2, 9, 32), torch.randn(2, 8, 32)
    (row,) = spt_compiler.explain(Translator(), *inputs, options=EXACT).sites
    assert (row.kind, row.status) == ("attention", "skipped") and "spt_compiler.compile(model)" in row.reason
    assert row.where.startswith(__file__)
    with pytest.warns(UserWarning, match="stays dense: a graph break inside of torch's own transformer"):
        torch.compile(Translator(), backend="spt", options={**EXACT, "inner": "eager"})(*inputs)
    torch._dynamo.reset()
    model = spt_compiler.compile(Translator(), **{**EXACT, "inner": "eager"})
    model(*inputs)
    assert sum(row.status == "replaced" for rows in debug.reports() for row in rows) == 10
