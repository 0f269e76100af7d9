"""A fuzzer's case without a trainer: an accelerated model in a loop of one's own, beside plain PyTorch and fp64."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spu

__all__ = ["run_loop"]

CLASSES, SCALE = 11, 2.0**10
Loss = Callable[[nn.Module], Tensor]


class Beside(nn.Module):
    """A residual branch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Decoder(nn.Module):
    """A layer of a transformers decoder."""

    def __init__(self, layer: nn.Module, positions: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.positions = layer, positions

    def forward(self, x: Tensor) -> Tensor:
        keywords = {}
        if self.positions is not None:
            places = torch.arange(x.shape[1])[None]
            keywords = {"position_embeddings": self.positions(x, places), "position_ids": places}
        out = self.layer(x, **keywords)
        return out if isinstance(out, Tensor) else out[0]


def _llama(r: random.Random, width: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=CLASSES, hidden_size=width, intermediate_size=r.choice([8, 20]), num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=r.choice([1, 2]), attention_bias=r.random() < 0.5,
        mlp_bias=r.random() < 0.5, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaModel(config)
    return Decoder(model.layers[0], model.rotary_emb)


def _gpt2(r: random.Random, width: int) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=CLASSES, n_embd=width, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        activation_function=r.choice(["gelu_new", "gelu"]), bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Decoder(transformers.GPT2Model(config).h[0])


def _block(r: random.Random, width: int) -> nn.Module:
    """Smooth in its input: where it has a kink, two roundings of one value may have unlike gradients."""
    hidden = r.choice([4, 12, 24])

    def linear(inner: int, outer: int) -> nn.Module:
        return nn.Linear(inner, outer, bias=r.random() < 0.5)

    def activation() -> nn.Module:
        return r.choice([nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh(), nn.Sigmoid()])

    kinds: list[Callable[[], nn.Module]] = [
        lambda: linear(width, width),
        lambda: nn.Sequential(linear(width, hidden), activation(), linear(hidden, width)),
        lambda: nn.Sequential(linear(width, hidden), activation(), linear(hidden, hidden), linear(hidden, width)),
        lambda: nn.Sequential(linear(width, width), nn.Dropout(0.0), activation()),
        lambda: nn.LayerNorm(width, elementwise_affine=r.random() < 0.7, bias=r.random() < 0.5),
        lambda: nn.RMSNorm(width, elementwise_affine=r.random() < 0.7),
        activation,
        lambda: Beside(_block(r, width)),
        lambda: _llama(r, width),
        lambda: _gpt2(r, width),
    ]
    return r.choice(kinds)()


def draw_model(r: random.Random) -> nn.Sequential:
    """Embedding, blocks, norm and head; perhaps tied, with a block twice, or with frozen parameters."""
    width = r.choice([8, 16])
    blocks = [_block(r, width) for _ in range(r.randint(1, 4))]
    if r.random() < 0.2:
        blocks.append(blocks[0])
    embedding = nn.Embedding(CLASSES, width, padding_idx=r.choice([None, 0]))
    model = nn.Sequential(embedding, *blocks, nn.LayerNorm(width), nn.Linear(width, CLASSES, bias=r.random() < 0.5))
    if r.random() < 0.3:
        model[-1].weight = embedding.weight
    for parameter in model.parameters():
        parameter.requires_grad_(r.random() < 0.75)
    model[-2].weight.requires_grad_()  # one at least
    return model


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _gradients(model: nn.Module, way: str, loss: Loss, r: random.Random) -> Sequence[Tensor | None]:
    """Return the gradients of a way to get some, the same ones for each ``r``."""
    times, own = r.choice([1, 2, 3]), _trained(model)
    some = [p for p in own if r.random() < 0.5] or own[:1]
    if way == "asked for":
        return torch.autograd.grad(loss(model), some, allow_unused=True)
    if way == "hooks":
        for parameter in some:
            parameter.register_hook(lambda grad: grad * 2)
    for _ in range(times):
        if way == "forwards between":
            with torch.no_grad():
                loss(model)
        loss(model).backward(inputs=some if way == "inputs" else None)
    return [p.grad for p in own]


WAYS = ["plain", "plain", "asked for", "hooks", "inputs", "forwards between", "checkpointed"]
PRECISIONS = [None, None, None, "bf16", "fp16", "fp32"]


def run_loop(seed: int) -> str:
    """Run the case of a seed; return its outcome.

    Raises:
        AssertionError: gradients are further from fp64's than plain PyTorch's.
    """
    r = random.Random(seed)
    torch.manual_seed(seed)
    plain = draw_model(r)
    precision, way, autocast = r.choice(PRECISIONS), r.choice(WAYS), r.random() < 0.3
    narrow = precision in ("bf16", "fp16") or autocast
    ids, targets = torch.randint(CLASSES, (3, 5)), torch.randint(CLASSES, (3, 5))
    ours, truth = copy.deepcopy(plain), copy.deepcopy(plain).double()
    spu.accelerate(ours, precision=precision)
    scaler = spu.GradScaler("cpu", init_scale=SCALE, growth_interval=10**6, enabled=precision == "fp16")
    optimizer = spu.optim.AdamW(_trained(ours), lr=1.0)

    def loss(model: nn.Module) -> Tensor:
        out = checkpoint(model, ids, use_reentrant=False) if way == "checkpointed" else model(ids)
        value = F.cross_entropy(out.flatten(0, 1).to(torch.promote_types(out.dtype, torch.float32)), targets.flatten())
        return value if model is truth else scaler.scale(value)

    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    want = _gradients(truth, way, loss, random.Random(seed))
    with torch.autocast("cpu", dtype, enabled=autocast):
        mine = _gradients(ours, way, loss, random.Random(seed))
    with torch.autocast("cpu", dtype, enabled=narrow):
        theirs = _gradients(plain, way, loss, random.Random(seed))
    scale = SCALE if precision == "fp16" else 1.0
    if way != "asked for":  # which are returned scaled
        scaler.unscale_(optimizer)
        mine = [None if grad is None else grad * scale for grad in mine]
    for i, (a, b, c) in enumerate(zip(mine, want, theirs, strict=True)):
        assert (a is None) == (b is None), f"{way} in {precision}: gradient {i} is {a}, in fp64 {b}"
        if a is None or b is None or c is None or b.norm() < 1e-6 or not c.isfinite().all():
            continue
        a, c = a / scale, c / scale
        error, usual = ((found.double() - b).norm() / b.norm() for found in (a, c))
        bound = max(3e-2, 3 * usual) if narrow else max(2e-5, 4 * usual)
        how = f"{way} in {precision}{' under autocast' if autocast else ''}"
        assert error <= bound, f"{how}: gradient {i} is off by {error:.1e}, plain torch's by {usual:.1e}"
    return "loop"
