"""LoRA, the main use: adapters of PEFT on any projection are part of their sites, frozen weights cost nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import spt_compiler
from spt_compiler import calibrate, learning
from tests import models
from tests.blocks import EXACT, SPARSE, assert_same, gradients, relative
from tests.ffn_cases import rms

peft = pytest.importorskip("peft")
LENGTH = 37
EAGER = {**EXACT, "inner": "eager"}

TARGETS: dict[str, Any] = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],  # Conv1D
    "bert": "all-linear",
    "opt": ["q_proj", "v_proj", "fc1", "fc2"],
    "t5": ["q", "v", "wi", "wo"],
    "bart": ["k_proj", "fc1", "fc2"],
    "vit": "all-linear",
    "mistral": ["q_proj", "up_proj"],
}


@pytest.fixture(autouse=True)
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def adapted(family: str = "llama", targets: Any = None, *, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """A tiny model of one layer with LoRA adapters that do something (B is not zero)."""
    model = models.build(family, zero_dropout=True, layers=1).to(dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets or TARGETS[family], **config))
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def inputs(family: str = "llama") -> dict[str, Tensor]:
    return models.inputs(family, length=LENGTH)


def grads_of(model: nn.Module, call: Callable, kwargs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    out = torch.cat([o.flatten() for o in calibrate.leaves(call(**kwargs)) if o.requires_grad])
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    (out * weight).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(model: nn.Module, family: str = "llama", options: dict[str, Any] = EAGER) -> None:
    """Every site is taken, and exact equals eager in outputs and in every gradient there is."""
    kwargs = inputs(family)
    found = spt_compiler.explain(model, options=SPARSE, **kwargs)
    assert (found.replaced("attention"), found.replaced("ffn")) == models.sites(family, 1), found.summary()
    expected = grads_of(model, model, kwargs)
    assert expected[1] and all(p.requires_grad == (n in expected[1]) for n, p in model.named_parameters())
    assert_same(grads_of(model, torch.compile(model, backend="spt", options=options), kwargs), expected)


# ---- what PEFT writes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TARGETS)
def test_adapters_on_every_projection(family):
    check(adapted(family), family)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 2, "lora_alpha": 32},
        {"use_rslora": True, "bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_settings_of_an_adapter(config):
    family = "llama" if "modules_to_save" in config else "bert"  # whose linear layers have biases
    check(adapted(family, **config), family)


@pytest.mark.parametrize("target", ["k_proj", "up_proj", "down_proj"])
def test_an_adapter_on_one_projection_alone(target):
    check(adapted(targets=[target]))


def test_adapters_through_aot_autograd_and_checkpointing():
    check(adapted(), options=EXACT)
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    check(model, options=EXACT)


@pytest.mark.slow
def test_adapters_through_inductor():
    check(adapted(), options={k: v for k, v in EXACT.items() if k != "inner"})
    model, kwargs = adapted(lora_dropout=0.1), inputs()
    run = torch.compile(model, backend="spt", options={k: v for k, v in SPARSE.items() if k != "inner"})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, target = [], None
    for _ in range(12):
        hidden = run(**kwargs).last_hidden_state
        target = torch.randn_like(hidden) if target is None else target
        loss = (hidden - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0], losses
    assert all(f["steps"] >= 11 for f in spt_compiler.metrics(model).values())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_half_precision_base_with_full_precision_adapters(family):
    model, kwargs = adapted(family, dtype=torch.bfloat16), inputs(family)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    found = spt_compiler.explain(model, options=SPARSE, **kwargs)
    assert (found.replaced("attention"), found.replaced("ffn")) == (1, 1), found.summary()
    eager = grads_of(model, model, kwargs)
    got = grads_of(model, torch.compile(model, backend="spt", options=EAGER), kwargs)
    assert {n: g.dtype for n, g in got[1].items()} == {n: g.dtype for n, g in eager[1].items()}
    # Both round; what counts is the distance to the exact result.
    exact = grads_of(model.double(), model, kwargs)
    for name, value in {"": exact[0], **exact[1]}.items():
        ours, theirs = (run[0] if not name else run[1][name] for run in (got, eager))
        errors = [rms(t.double() - value) / (rms(value) + 1e-30) for t in (ours, theirs)]
        assert errors[0] < 2 * errors[1] + 1e-6, (name, errors)


def test_adapters_under_autocast():
    model, kwargs = adapted(), inputs()

    def cast(call):
        def run(**kw):
            with torch.autocast("cpu", torch.bfloat16):
                return call(**kw)

        return run

    expected = grads_of(model, cast(model), kwargs)
    got = grads_of(model, cast(torch.compile(model, backend="spt", options=EAGER)), kwargs)
    assert got[0].dtype == expected[0].dtype
    assert_same(got, expected, 3e-2, 6e-2)


def test_several_adapters():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(target_modules=TARGETS["llama"], r=4, lora_alpha=2))
    randomise(model)
    kwargs = inputs()
    both = torch.compile(model, backend="spt", options=EAGER)
    for active in (["default", "second"], ["second"], ["default"]):
        model.base_model.set_adapter(active)
        assert spt_compiler.explain(model, options=SPARSE, **kwargs).replaced("ffn") == 1
        assert_same(grads_of(model, both, kwargs), grads_of(model, model, kwargs))


def test_merged_and_disabled_adapters():
    model, kwargs = adapted(), inputs()
    run = torch.compile(model, backend="spt", options=EAGER)
    unmerged = models.last_hidden(run(**kwargs)).detach()
    model.merge_adapter()
    assert relative(models.last_hidden(run(**kwargs)), unmerged) < 1e-4
    model.unmerge_adapter()
    with model.disable_adapter():
        bare = models.last_hidden(run(**kwargs)).detach()
        assert relative(bare, models.last_hidden(model(**kwargs))) < 1e-4
    assert relative(bare, unmerged) > 1e-3


def test_a_fused_projection_with_one_adapter():
    class Fused(nn.Module):
        """Gate and up in one linear layer, as Phi-3 has them, with a branch over both."""

        def __init__(self):
            super().__init__()
            self.inner, self.down = nn.Linear(32, 2 * 72, bias=False), nn.Linear(72, 32)
            self.a, self.b = nn.Linear(32, 4, bias=False), nn.Linear(4, 2 * 72, bias=False)

        def forward(self, x):
            gate, up = (self.inner(x) + self.b(self.a(x)) * 2).chunk(2, -1)
            return self.down(F.silu(gate) * up)

    model, x = Fused(), torch.randn(2, LENGTH, 32)
    assert spt_compiler.explain(model, x, options=SPARSE).replaced("ffn") == 1
    assert_same(gradients(model, torch.compile(model, backend="spt", options=EAGER), x), gradients(model, model, x))


# ---- dropout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_dropout_costs_no_site(family):
    model = adapted(family, lora_dropout=0.1).train()
    found = spt_compiler.explain(model, options=SPARSE, **inputs(family))
    assert (found.replaced("attention"), found.replaced("ffn")) == models.sites(family, 1), found.summary()


def test_dropout_of_the_branch_on_the_out_projection():
    """It is drawn anew by each call, follows the seed, acts on the branch alone, and is the same in backward."""
    model, x = Mlp(p=0.4).double(), torch.randn(2, LENGTH, 32, dtype=torch.float64)
    run = torch.compile(model, backend="spt", options=EAGER)

    def seeded(value: Tensor, seed: int = 5) -> Tensor:
        torch.manual_seed(seed)
        return run(value)

    assert torch.equal(seeded(x), seeded(x)) and not torch.equal(seeded(x, 6), seeded(x))
    undropped = Mlp(p=0.0).double()
    with torch.no_grad():
        model.b1.weight.zero_()  # the other branch is behind a non-linearity: its dropout shifts the mean
        undropped.load_state_dict(model.state_dict())
        plain = undropped(x)
        mean = torch.stack([seeded(x, s) for s in range(100)]).mean(0)
        assert 0 < rms(mean - plain) < 0.2 * rms(seeded(x) - plain)
        model.b2.weight.zero_()
        undropped.b2.weight.zero_()
        assert relative(seeded(x), undropped(x)) < 1e-9
    randomise_all(model)
    direction, leaf = torch.randn_like(x), x.clone().requires_grad_()
    seeded(leaf).square().sum().backward()
    with torch.no_grad():
        numeric = (seeded(x + 1e-6 * direction).square().sum() - seeded(x - 1e-6 * direction).square().sum()) / 2e-6
    assert relative((leaf.grad * direction).sum(), numeric) < 1e-5


class Mlp(nn.Module):
    """Linear-GELU-linear, frozen, with a branch on each projection."""

    def __init__(self, p: float = 0.0, frozen: bool = True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 72), nn.Linear(72, 32)
        self.a1, self.b1 = nn.Linear(32, 4, bias=False), nn.Linear(4, 72, bias=False)
        self.a2, self.b2 = nn.Linear(72, 4, bias=False), nn.Linear(4, 32, bias=False)
        self.dropout = nn.Dropout(p)
        for layer in (self.fc1, self.fc2):
            layer.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.fc1(x) + self.b1(self.a1(self.dropout(x))) * 2.0)
        return self.fc2(h) + self.b2(self.a2(self.dropout(h))) * 2.0


def randomise_all(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)


# ---- frozen weights -----------------------------------------------------------------------------------------------


@contextmanager
def products(sizes: list[tuple[int, ...]]) -> Iterator[None]:
    """Notes the sizes of every matrix product that runs, inside of operators as well."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        yield
    for event in seen.events():
        first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}.get(event.name)
        if first is not None:
            left, right = event.input_shapes[first : first + 2]
            sizes.append((left[0], left[1], right[1]))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_frozen_weights_get_no_gradient_and_cost_no_product(inner):
    x = torch.randn(64, 32).double()  # in ATen's operators, whose products can be counted
    costs = {}
    for frozen in (True, False):
        torch._dynamo.reset()
        model = Mlp(frozen=frozen).double()
        out = torch.compile(model, backend="spt", options={**EXACT, "inner": inner})(x)
        sizes: list[tuple[int, ...]] = []
        with products(sizes):
            out.sum().backward()
        assert (model.fc1.weight.grad is None) == frozen == (model.fc2.bias.grad is None)
        costs[frozen] = sum(2 * a * b * c for a, b, c in sizes)
    # Two products as large as the weights: dW of either projection.
    assert costs[False] - costs[True] == 2 * (2 * 64 * 32 * 72)


def test_an_optimizer_step_leaves_the_base_as_it_was():
    model, kwargs = adapted(), inputs()
    run = torch.compile(model, backend="spt", options={**SPARSE, "ffn.density": 0.5})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        models.last_hidden(run(**kwargs)).square().mean().backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


# ---- sparse runs and learning -------------------------------------------------------------------------------------


def test_the_branch_on_the_out_projection_sees_the_selected_blocks_only():
    """A of a branch gets a gradient in the hidden units that some token selected, and in no other."""
    torch.manual_seed(0)
    model = Mlp()
    options = {**SPARSE, "ffn.density": 0.25, "ffn.blocks": 8, "ffn.router": "static"}
    run = torch.compile(model, backend="spt", options=options)
    x = torch.randn(2, 100, 32)
    for _ in range(2):
        run(x).sum().backward()
    model.zero_grad()
    run(x).sum().backward()
    touched = model.a2.weight.grad.abs().sum(0) > 0
    assert int(touched.sum()) == 18  # 2 of 8 blocks of 9 units, the same ones for every token
    assert torch.equal(touched, model.b1.weight.grad.abs().sum(1) > 0)


def test_learning_sees_the_merged_weights():
    """After an adapter has changed what the block computes, the fitted mean of a dropped block is the merged block's."""
    model, x = Mlp(), torch.randn(4, 100, 32)
    run = torch.compile(model, backend="spt", options=SPARSE)
    run(x).sum().backward()
    seen: dict[str, Any] = {}
    original = learning.hidden

    def spy(weights, rows):
        seen.update(weights)
        return original(weights, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "hidden", spy)
        run(x)
    merged_in = model.fc1.weight + 2 * model.b1.weight @ model.a1.weight
    merged_out = model.fc2.weight + 2 * model.b2.weight @ model.a2.weight
    torch.testing.assert_close(seen["w_in"][0], merged_in.detach())
    torch.testing.assert_close(seen["w_out"], merged_out.detach())


def test_state_has_the_names_of_the_bare_model():
    """So that it fits the model before adapters are added and after they are merged."""
    model, kwargs = adapted(), models.inputs("llama", length=100)
    run = torch.compile(model, backend="spt", options=SPARSE)
    for _ in range(2):
        models.last_hidden(run(**kwargs)).sum().backward()
    state = spt_compiler.state_dict(model)
    assert {n.rpartition(".")[0] for n in state} == {
        "layers.0.self_attn.k_proj/attention/0",
        "layers.0.mlp.gate_proj/ffn/0",
    }
    assert spt_compiler.load_state_dict(model.merge_and_unload(), state) == []


# ---- what is declined ---------------------------------------------------------------------------------------------

DECLINED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: peft.LoraConfig(target_modules=TARGETS["llama"], use_dora=True), "a graph break cuts it"),
    "LoHa": (lambda: peft.LoHaConfig(target_modules=TARGETS["llama"]), "a graph break cuts it"),
    "LoKr": (lambda: peft.LoKrConfig(target_modules=TARGETS["llama"]), "a graph break cuts it"),
    "OFT": (lambda: peft.OFTConfig(target_modules=TARGETS["llama"], oft_block_size=8), "read different inputs"),
    "AdaLoRA": (lambda: peft.AdaLoraConfig(target_modules=TARGETS["llama"], total_step=10), "read different inputs"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DECLINED)
def test_other_adapters_keep_the_ffn_dense_with_a_reason(name):
    make, reason = DECLINED[name]
    model, kwargs = peft.get_peft_model(models.build("llama", zero_dropout=True, layers=1), make()), inputs()
    found = spt_compiler.explain(model, options=SPARSE, **kwargs)
    assert (found.replaced("attention"), found.replaced("ffn")) == (1, 0), found.summary()
    assert [reason in s.reason for s in found.sites if s.kind == "ffn"] == [True], found.summary()
    assert_same(grads_of(model, torch.compile(model, backend="spt", options=EAGER), kwargs), grads_of(model, model, kwargs))


def test_ia3_is_taken():
    """Its vector on the hidden activation is a parameter of the activation."""
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    check(peft.get_peft_model(models.build("llama", zero_dropout=True, layers=1), config))


class _Dequantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return x @ (weight.to(x.dtype) * scale).t()

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return grad @ (weight.to(grad.dtype) * scale), None, None


class Packed(nn.Module):
    """A linear layer of 8-bit weights with its own autograd function."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-8, 8, (n_out, n_in), dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.02))

    def forward(self, x: Tensor) -> Tensor:
        return _Dequantise.apply(x, self.weight, self.scale)


@torch.library.custom_op("tests::packed_product", mutates_args=())
def packed_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x @ (weight.to(x.dtype) * scale).t()


@packed_product.register_fake
def _(x, weight, scale):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _packed_backward(ctx, grad):
    weight, scale = ctx.saved_tensors
    return grad @ (weight.to(grad.dtype) * scale), None, None


packed_product.register_autograd(_packed_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]))


class Operator(Packed):
    """The same by an operator of the library."""

    def forward(self, x: Tensor) -> Tensor:
        return packed_product(x, self.weight, self.scale)


class Unpacked(Packed):
    """The same, unpacked into an ordinary product."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


class Quantised(Tensor):
    """8 bits and a scale that look like a float tensor, as quantisation libraries make them."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor):
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, requires_grad=False)

    def __init__(self, data: Tensor, scale: Tensor):
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data_", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, _meta, _size, _stride):
        return Quantised(inner["data_"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].data_, args[0].scale)

        def full(value):
            return value.data_.to(value.scale.dtype) * value.scale if isinstance(value, Quantised) else value

        return func(*map(full, args), **(kwargs or {}))


class Subclassed(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        data = torch.randint(-8, 8, (n_out, n_in), dtype=torch.int8)
        self.weight = nn.Parameter(Quantised(data, torch.tensor(0.02)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@pytest.mark.parametrize(
    "layer, reason",
    [(Packed, "no linear layers"), (Operator, "no linear layers"), (Unpacked, "no parameter"), (Subclassed, "of type Quantised")],
)
def test_quantised_layers_keep_the_ffn_dense_and_attention_is_taken(layer, reason):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.gain = nn.LayerNorm(32), nn.Parameter(torch.ones(32))
            self.qkv, self.gate, self.up, self.down = layer(32, 96), layer(32, 72), layer(32, 72), layer(72, 32)

        def forward(self, x):
            q, k, v = self.qkv(x * self.gain).view(2, LENGTH, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            x = self.norm(x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))
            return x + self.down(F.silu(self.gate(x)) * self.up(x))

    model, x = Layer(), torch.randn(2, LENGTH, 32)
    found = spt_compiler.explain(model, x, options=SPARSE)
    assert (found.replaced("attention"), found.replaced("ffn")) == (1, 0), found.summary()
    assert [reason in s.reason for s in found.sites if s.kind == "ffn"] == [True], found.summary()
    assert_same(gradients(model, torch.compile(model, backend="spt", options=EAGER), x), gradients(model, model, x))


def test_bottleneck_adapters_are_declined_whatever_the_thresholds():
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(32, 8), nn.Linear(8, 32)

        def forward(self, x):
            return x + self.up(F.relu(self.down(x)))

    for options in (SPARSE, EXACT):
        found = spt_compiler.explain(Adapter(), torch.randn(2, LENGTH, 32), options=options)
        assert [s.reason for s in found.sites] == ["hidden width 8 is below the model width 32: a bottleneck adapter"]


def test_attention_over_a_handful_of_keys_stays_dense_by_its_threshold():
    class Fusion(nn.Module):
        """Each token attends over the outputs of six adapters."""

        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x, adapters):
            scores = torch.matmul(self.q(x)[:, :, None], self.k(adapters).transpose(-1, -2))
            return torch.matmul(scores.softmax(-1), self.v(adapters))[:, :, 0]

    inputs = (torch.randn(2, LENGTH, 32), torch.randn(2, LENGTH, 6, 32))
    (site,) = spt_compiler.explain(Fusion(), *inputs, options={"inner": "eager", "ffn.min_width": 0}).sites
    assert site.status == "skipped" and ("6 keys are fewer" in site.reason or "length 1" in site.reason)
