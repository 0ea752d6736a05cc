"""What stands between a module's call and its weights."""

from __future__ import annotations

from torch import Tensor, nn

_KNOWN = (nn.Linear, nn.LayerNorm, nn.Embedding)


def computes_alone(*modules: nn.Module) -> bool:
    """Whether modules' weights may be read in place of calling them.

    No hooks watch or prepare the call, ``forward`` is not replaced, and weights are whole tensors:
    not sharded, not quantised.
    """
    return all(
        not _is_watched(module) and not _is_replaced(module) and _has_whole_weights(module)
        for module in modules
    )


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_replaced(module: nn.Module) -> bool:
    """Another ``forward`` on the instance, or in a subclass of a layer that torch has."""
    known = next((kind for kind in _KNOWN if isinstance(module, kind)), None)
    own = known is not None and type(module).forward is not known.forward
    return own or "forward" in vars(module)


def _has_whole_weights(module: nn.Module) -> bool:
    weights = (weight for weight in module._parameters.values() if weight is not None)
    return all(type(weight.data) is Tensor for weight in weights)
