"""A causal LM of Hugging Face transformers as a stack of policies, one per layer.

    pi^l_Layer = softmax(H^l E_u^T),  l = 1..L     (arXiv 2512.19673, eq. of pi^l_Layer)

H^l [..., D] is the residual stream after layer l, E_u [V, D] the unembedding. H^l is raw, as in the
paper; final_norm=True puts the model's final norm between them, and layer L is then the model.

For all families, the layer list shows its first l layers only and the final norm hands its input
through: both get another class for a while, as FSDP2 does it. Other modules in their place would
hide the upper layers from state_dict() and FSDP's lazy initialisation; modules shadowed in __dict__
go unnoticed by torch.compile, which would silently keep the graph of the full policy.
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

    weight [V, D], bias [V] or None, softcap c (None: cap(x) = x). Softcap first, then scale, as in
    the LM-head op with this temperature (times that of sampling). A family that scales first is
    brought to this order exactly: c tanh(s x / c) = s (c/s) tanh(x / (c/s)); softcap holds c/s.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    @property
    def temperature(self) -> float:
        return 1.0 / self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V], all in memory: for checks and small inputs."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits * self.scale


def num_layers(model: nn.Module) -> int:
    """L, the number of decoder layers. Errors: as internal_policy."""
    return _find_stack("num_layers", model)[2]


class Stack(NamedTuple):
    """The decoder layers, 1..L, and the norm that stands between H^L and the unembedding."""

    layers: list[nn.Module]
    norm: nn.Module


def decoder_stack(model: nn.Module) -> Stack:
    """The model's layers and final norm. Errors: as internal_policy."""
    layers, norm, _ = _find_stack("decoder_stack", model)
    return Stack(list(layers), norm)


def parameter_layers(model: nn.Module) -> dict[str, int | None]:
    """Where each parameter acts: 1..L in that decoder layer, L + 1 in the final norm, None in the
    head, 0 in anything else (embeddings). A tied head is the embedding: 0.

    Names as named_parameters() has them, a tied one once. Errors: as internal_policy.
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
    """The model's head, tied or not: its own parameters, and the measured softcap and scale.

    Measured once, in a forward of one token, because names mislead: `logits_scaling` divides in
    Granite and multiplies in HyperCLOVA X. With FSDP2 all ranks make that first call; weight is the
    whole matrix between a forward of the root and its backward, this rank's DTensor otherwise.
    Errors: TypeError if model is no causal LM, ValueError if its head is no nn.Linear.
    """
    head = _find_head("unembedding", model)
    if model not in _logit_maps:
        token = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
        points = torch.tensor([[[2.0**-40, 2.0**20]]], dtype=torch.float64)  # linear, capped
        with _undisturbed(model), _recast(head, _Head, seen=[], logits=points):
            scale, bent = (model(input_ids=token, use_cache=False).logits / points)[0, 0].tolist()
        linear = math.isclose(scale, bent, rel_tol=1e-6)
        _logit_maps[model] = None if linear else bent * 2.0**20 / scale, scale
    return Unembedding(head.weight, head.bias, *_logit_maps[model])


@contextmanager
def half_precision(model: nn.Module) -> Iterator[None]:
    """Inside, model(...) and model.generate(...) compute in bfloat16 as a training step does: under
    autocast, the head's products summed and kept in float32, as by the fused ops."""
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

    That is so for model(...), hidden_states(model, ...) and model.generate(...). Layers above l are
    not called: time and memory follow l / L. They get no gradient, nor does the final norm, unless
    final_norm=True applies it to H^l. Backward may run later, with gradient checkpointing too.
    Hazards: one thread per model. Weight decay moves what has a gradient of zero and not of None:
    use zero_grad(set_to_none=True). Checkpointing the whole model as one piece recomputes another
    policy after the context. Inside, do not copy or pickle the model; a hybrid without attention in
    layers 1..l needs use_cache=False. Errors: TypeError for no causal LM, ValueError for a layer
    outside 1..L or a family that cannot be served, RuntimeError inside another internal policy.
    """
    op = "internal_policy"
    _find_head(op, model)
    if outer := [len(each) for each in model.modules() if isinstance(each, _FirstLayers)]:
        raise RuntimeError(f"{op}: model: expected no outer policy, came that of layer {outer[0]}")
    if layer is None:
        yield
        return
    layers, norm, depth = _find_stack(op, model)
    if type(layer) is not int or not 1 <= layer <= depth:  # not isinstance: True is no layer
        raise ValueError(f"{op}: layer: expected an int in 1..{depth}, came {layer!r}")
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
    """input_ids [B, T] -> [B, T, D], what the unembedding sees under the current policy.

    No logits, no cache, but a call of the model, so that FSDP's hooks run. kw goes to the model.
    Errors: as unembedding; ValueError if the model does not call its head once.
    """
    op, seen = "hidden_states", list[Tensor]()
    if position_ids is not None:  # not every family has them
        kw["position_ids"] = position_ids
    with _recast(_find_head(op, model), _Head, seen=seen, logits=torch.zeros(1, 1, 1)):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kw)
    if len(seen) != 1:
        raise ValueError(f"{op}: {_name(model)}: expected one call of the head, came {len(seen)}")
    return seen[0]


def check_internal_policy(model: nn.Module, layer: int | list[int] | None = None) -> None:
    """Start-up check on a small batch of the layers given (None: all), against the model itself.

    Layer l: the model's own hidden_states[l], the logits of unembedding(model); L with norm: its
    logits. Leaves training flags, gradients and random state alone. Errors: ValueError naming
    family, layer and measured difference; else as internal_policy.
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
            wanted = f"cannot be served: expected {depth + 1} hidden states, came {len(stream)}"
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
                    wanted = f"the model's own {what} within {limit:.1e}, came {off:.3e} off"
                    raise ValueError(f"{op}: {where}: cannot be served: expected {wanted}")


class _FirstLayers(nn.ModuleList):  # the first `shown` to a forward, all of them to parameters()
    shown: int

    def __len__(self) -> int:
        return self.shown

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self[:])

    def __getitem__(self, index: Any) -> Any:
        return list(self._modules.values())[: self.shown][index]


class _SkippedNorm(nn.Identity): ...  # "norm" in the name is for _find_stack


class _Head(nn.Linear):  # notes its input, answers with given logits
    seen: list[Tensor]
    logits: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden)
        return self.logits.clone()  # a model may scale them in place


class _WidenedHead(nn.Linear):  # factors in bfloat16, sums in float32
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
        restore.callback(model.reshard)  # FSDP2's root stays whole after a forward
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
        raise TypeError(f"{op}: model: expected a transformers LM, came {type(model).__name__}")
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{op}: {_name(model)}: expected a Linear head, came {type(head).__name__}"
        )
    return head


def _find_stack(op: str, model: Any) -> tuple[nn.ModuleList, nn.Module, int]:
    """The list of num_hidden_layers decoder layers, the norm beside that list, the number."""
    _find_head(op, model)
    refused = f"{op}: {_name(model)}: cannot be served: expected"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{refused} a decoder-only model, came an encoder-decoder")
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
        raise ValueError(f"{refused} one list of {depth} layers and a norm beside it, came {came}")
    # The first after the layers (OPT: before them), not the norm of embeddings that BLOOM has.
    norm = min(norms, key=lambda i: ("emb" in parts[i][0], i < found[0]))
    return parts[found[0]][1], parts[norm][1], depth
