"""A causal LM of Hugging Face transformers as a stack of policies, one per layer.

    pi^l_Layer = softmax(H^l E_u^T),  l = 1..L     (arXiv 2512.19673, eq. of pi^l_Layer)

H^l [..., D] is the residual stream after layer l, E_u [V, D] the unembedding. H^l is raw, as in the
paper; final_norm=True applies the model's final norm to it, and layer L is then the model itself.

For all families, the layer list temporarily shows only its first l layers and the final norm
returns its input. To do so, both modules are given another class, as FSDP2 does. Replacing the
modules instead would hide the upper layers from state_dict() and FSDP's lazy initialisation, and
torch.compile would not notice modules shadowed in `__dict__` and would keep the full policy's
graph.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class Unembedding(NamedTuple):
    """The head as the model applies it: logits = scale * cap(h W^T + b), cap(x) = c tanh(x / c).

    weight is [V, D], bias [V] or None, softcap c (None: cap(x) = x). The softcap comes before the
    scale, as in the LM-head op with this temperature (times that of sampling). A family that scales
    first is converted exactly: c tanh(s x / c) = s (c/s) tanh(x / (c/s)), and softcap holds c/s.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    @property
    def temperature(self) -> float:
        return 1.0 / self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Computes logits [..., V] from hidden [..., D], all in memory, for checks and small
        inputs."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits * self.scale


def num_layers(model: nn.Module) -> int:
    """Returns L, the number of decoder layers. Errors: as internal_policy."""
    return _find_stack("num_layers", model)[2]


class Stack(NamedTuple):
    """The decoder layers, 1..L, and the final norm between H^L and the unembedding."""

    layers: list[nn.Module]
    norm: nn.Module


def decoder_stack(model: nn.Module) -> Stack:
    """Returns the model's layers and final norm. Errors: as internal_policy."""
    layers, norm, _ = _find_stack("decoder_stack", model)
    return Stack(list(layers), norm)


def parameter_layers(model: nn.Module) -> dict[str, int | None]:
    """Returns the place of each parameter: 1..L for a decoder layer, L + 1 for the final norm, None
    for the head and 0 for anything else (embeddings). A tied head counts as the embedding, 0.

    The names are those of named_parameters(), which lists a tied parameter once. Errors: as
    internal_policy.
    """
    layers, norm, depth = _find_stack("parameter_layers", model)
    head: Any = _find_head("parameter_layers", model)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    place: dict[int, int | None] = {id(p): None for p in head.parameters()}
    place |= {id(p): 0 for p in embedding.parameters()}
    for number, part in enumerate([*layers, norm], start=1):
        place |= {id(p): number for p in part.parameters()}
    assert len(layers) == depth, "outside of internal_policy"
    return {name: place.get(id(p), 0) for name, p in model.named_parameters()}


_logit_maps: WeakKeyDictionary[nn.Module, tuple[float | None, float]] = WeakKeyDictionary()


def unembedding(model: nn.Module) -> Unembedding:
    """Returns the model's head, tied or not: its parameters, and the measured softcap and scale.

    Softcap and scale are measured once, in a forward of one token, because names mislead:
    `logits_scaling` divides in Granite and multiplies in HyperCLOVA X. With FSDP2, all ranks must
    make that first call; weight is the whole matrix between a forward of the root and its backward,
    else this rank's DTensor. Errors: TypeError if model is not a causal LM, ValueError if its head
    is not an nn.Linear.
    """
    head = _find_head("unembedding", model)
    if model not in _logit_maps:
        token = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
        points = torch.tensor([[[2.0**-40, 2.0**20]]], dtype=torch.float64)  # linear, capped
        with _undisturbed(model), _recast(head, _Head, seen=[], logits=points):
            scale, bent = (model(input_ids=token, use_cache=False).logits / points)[0, 0].tolist()
        # A softcap c gives c * scale for a large input; without one the map is linear.
        linear = math.isclose(scale, bent, rel_tol=1e-6)
        _logit_maps[model] = None if linear else bent * 2.0**20 / scale, scale
    return Unembedding(head.weight, head.bias, *_logit_maps[model])


@contextmanager
def half_precision(model: nn.Module) -> Iterator[None]:
    """Inside, model(...) and model.generate(...) compute in bfloat16 like a training step: under
    autocast, with the head's products summed and kept in float32, as in the fused ops."""
    head = _find_head("half_precision", model)
    weight = head.weight.detach().to(torch.bfloat16).float()
    autocast = torch.autocast(head.weight.device.type, torch.bfloat16)
    with autocast, _recast(head, _WidenedHead, widened=weight):
        yield


@contextmanager
def internal_policy(
    model: nn.Module, layer: int | None, final_norm: bool = False
) -> Iterator[None]:
    """Inside, the model is pi^l = softmax(H^l E_u^T) with l = layer in 1..L; None changes nothing.

    This holds for model(...), hidden_states(model, ...) and model.generate(...). Layers above l are
    not called, so time and memory are proportional to l / L. These layers get no gradient, and
    neither does the final norm unless final_norm=True applies it to H^l. The backward may run after
    the context, also with gradient checkpointing. Hazards: use a model in one thread only. Weight
    decay moves parameters whose gradient is zero rather than None, so use
    zero_grad(set_to_none=True). Checkpointing the whole model as one piece recomputes a different
    policy after the context. Inside, do not copy or pickle the model. A hybrid without attention in
    layers 1..l needs use_cache=False. Errors: TypeError if model is not a causal LM, ValueError for
    a layer outside 1..L or an unsupported family, RuntimeError inside another internal policy.
    """
    op = "internal_policy"
    _find_head(op, model)
    if outer := [len(each) for each in model.modules() if isinstance(each, _FirstLayers)]:
        raise RuntimeError(f"{op}: model: expected no outer policy, got that of layer {outer[0]}")
    if layer is None:
        yield
        return
    layers, norm, depth = _find_stack(op, model)
    if type(layer) is not int or not 1 <= layer <= depth:  # not isinstance, which accepts True
        raise ValueError(f"{op}: layer: expected an int in 1..{depth}, got {layer!r}")
    skipped = nullcontext() if final_norm else _recast(norm, _SkippedNorm)
    with _recast(layers, _FirstLayers, shown=layer), skipped:
        yield


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kw: Any,
) -> Tensor:
    """Returns the input [B, T, D] of the unembedding under the current policy for input_ids [B, T].

    It computes no logits and no cache, but calls the model, so that FSDP's hooks run. kw is passed
    to the model. Errors: as unembedding; ValueError unless the model calls its head exactly once.
    """
    op, seen = "hidden_states", list[Tensor]()
    if position_ids is not None:  # not every family takes them
        kw["position_ids"] = position_ids
    with _recast(_find_head(op, model), _Head, seen=seen, logits=torch.zeros(1, 1, 1)):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kw)
    if len(seen) != 1:
        raise ValueError(f"{op}: {_name(model)}: expected one call of the head, got {len(seen)}")
    return seen[0]


def check_internal_policy(model: nn.Module, layer: int | list[int] | None = None) -> None:
    """Checks the given layers (None: all) on a small batch against the model itself, at start-up.

    Layer l must give the model's own hidden_states[l] and the logits of unembedding(model); layer L
    with the norm must give the model's logits. Training flags, gradients and random state are not
    changed. Errors: ValueError naming family, layer and measured difference; else as
    internal_policy.
    """
    op = "check_internal_policy"
    _, norm, depth = _find_stack(op, model)
    chosen = range(1, depth + 1) if layer is None else layer if isinstance(layer, list) else [layer]
    weight = _find_head(op, model).weight
    seeded = torch.Generator().manual_seed(0)
    batch = torch.randint(weight.shape[0], (2, 8), generator=seeded).to(weight.device)
    last: list[Tensor] = []  # H^L is the norm's input; the model's hidden_states[-1] is its output
    with _undisturbed(model), internal_policy(model, None):
        with norm.register_forward_pre_hook(lambda _, args: last.append(args[0])):
            own = model(batch, use_cache=False, output_hidden_states=True)
        stream = [*(own.hidden_states or ())[:-1], *last]
        if len(stream) != depth + 1:
            wanted = f"not supported: expected {depth + 1} hidden states, got {len(stream)}"
            raise ValueError(f"{op}: {_name(model)}: {wanted}")
        for each, normed in [*((each, False) for each in chosen), (depth, True)]:
            with internal_policy(model, each, normed):
                hidden, logits = hidden_states(model, batch), model(batch, use_cache=False).logits
            head = unembedding(model)
            pairs = [("hidden", hidden, stream[each]), ("logits", logits, head.logits(hidden))]
            for what, came, theirs in [("logits", logits, own.logits)] if normed else pairs:
                off = (came - theirs).abs().max().item() if came.shape == theirs.shape else math.inf
                limit = 8 * torch.finfo(theirs.dtype).eps * theirs.abs().max().item()
                if not off <= limit:  # in this form nan fails too
                    where = f"{_name(model)}, layer {each}" + " with norm" * normed
                    wanted = f"the model's own {what} within {limit:.1e}, got an error of {off:.3e}"
                    raise ValueError(f"{op}: {where}: not supported: expected {wanted}")


class _FirstLayers(nn.ModuleList):  # a forward sees the first `shown`, parameters() sees all
    shown: int

    def __len__(self) -> int:
        return self.shown

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self[:])

    def __getitem__(self, index: Any) -> Any:
        return list(self._modules.values())[: self.shown][index]


class _SkippedNorm(nn.Identity): ...  # _find_stack looks for "norm" in the name


class _Head(nn.Linear):  # records its input and returns the given logits
    seen: list[Tensor]
    logits: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden)
        return self.logits.clone()  # a model may scale them in place


class _WidenedHead(nn.Linear):  # multiplies bfloat16 values and sums in float32
    widened: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.bfloat16().float(), self.widened, self.bias)


@contextmanager
def _recast(module: nn.Module, cls: type[nn.Module], **attributes: Any) -> Iterator[None]:
    state, original = vars(module), module.__class__
    forward = {"forward": state.pop("forward")} if "forward" in state else {}  # by accelerate
    module.__class__ = cls
    state.update(attributes)
    try:
        yield
    finally:
        module.__class__ = original
        for name in attributes:
            del state[name]
        state.update(forward)


def _undisturbed(model: Any) -> ExitStack:
    restore = ExitStack()
    if hasattr(model, "reshard") and hasattr(next(model.parameters()), "full_tensor"):
        restore.callback(model.reshard)  # FSDP2's root stays unsharded after a forward
    for module in model.modules():
        restore.callback(setattr, module, "training", module.training)
    model.eval()  # dropout would draw random numbers
    restore.enter_context(torch.no_grad())
    return restore


def _name(model: Any) -> str:
    return f"model of family {model.config.model_type!r}"


def _find_head(op: str, model: Any) -> nn.Linear:
    needed = ("config", "get_decoder", "get_output_embeddings")
    if not isinstance(model, nn.Module) or not all(hasattr(model, name) for name in needed):
        raise TypeError(f"{op}: model: expected a transformers LM, got {type(model).__name__}")
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{op}: {_name(model)}: expected a Linear head, got {type(head).__name__}")
    return head


def _find_stack(op: str, model: Any) -> tuple[nn.ModuleList, nn.Module, int]:
    """Returns the list of decoder layers, the norm in the same module, and the number of layers."""
    _find_head(op, model)
    refused = f"{op}: {_name(model)}: not supported: expected"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{refused} a decoder-only model, got an encoder-decoder")
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for backbone in model.get_decoder().modules():  # outermost first
        parts = list(backbone._modules.items())
        found = [i for i, (_, part) in enumerate(parts) if isinstance(part, nn.ModuleList)]
        found = [i for i in found if len(parts[i][1]._modules) == depth]
        if found:
            break
    norms = [i for i, (_, part) in enumerate(parts) if "norm" in type(part).__name__.lower()]
    if len(found) != 1 or not norms:
        came = f"{len(found)} and {len(norms)}"
        raise ValueError(f"{refused} one list of {depth} layers and a norm beside it, got {came}")
    # Take the first norm after the layers (in OPT, before them), but not BLOOM's embedding norm.
    norm = min(norms, key=lambda i: ("emb" in parts[i][0], i < found[0]))
    return parts[found[0]][1], parts[norm][1], depth
