"""Encoder and decoder of patches: K tokens to one latent vector and back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from calm_kernels.nn.gated_ffn import GatedFFN
from calm_kernels.nn.rms_norm import RMSNorm
from calm_kernels.ops.linear_argmax import linear_argmax
from calm_kernels.ops.patch_codec import (
    embed_flatten,
    expand_patches,
    folded_squeezed_gather,
    folded_table_gather,
    fresh_ids,
    squeeze_patches,
    squeezed_tables,
    weight_stamps,
)
from calm_kernels.ops.random import philox_uniform
from calm_kernels.reference.philox import Stream

FOLD_MODES = ("table", "squeezed")


@dataclass(frozen=True)
class FoldedEncoder:
    """Everything up to the squeeze as lookup tables, for an encoder whose weights stay put.

    The first stage sees one token at a time, so its output is a function of the token alone.
    Mode ``"table"`` holds that function, [V, H], and leaves the squeeze matmul; mode ``"squeezed"``
    holds its product with each K-th of the squeeze weight, [K, V, H], and leaves K gathers and
    a sum. The tables are in the weights' dtype and carry no gradient.

    Made by :func:`fold_encoder`. Using it after a source weight was written to, replaced or moved
    raises RuntimeError, in compiled code too. What is not seen: writes through ``Tensor.data`` on a
    GPU, and such writes on the CPU that leave the sampled entries of
    :func:`~calm_kernels.ops.patch_codec.weight_stamps` as they were.
    """

    mode: str
    tables: Tensor
    squeeze_weight: Tensor
    squeeze_bias: Tensor
    sources: tuple[Tensor, ...]
    stamps: tuple[int, ...]
    _memory: tuple[Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Kept from being freed: at an address that is used again a new weight would look old.
        object.__setattr__(self, "_memory", tuple(source.detach() for source in self.sources))

    def is_stale(self, weights: Sequence[Tensor] | None = None) -> bool:
        """Whether a source weight changed after folding.

        Args:
            weights: what stands in the place of ``sources`` now, if they may have been replaced.
        """
        weights = self.sources if weights is None else weights
        return weight_stamps(weights) != list(self.stamps)

    def __call__(self, ids: Tensor, weights: Sequence[Tensor] | None = None) -> Tensor:
        """ids [P, K] -> squeezed patches [P, H], as the unfolded first stage and squeeze give.

        ``weights`` as in :meth:`is_stale`.
        """
        ids = fresh_ids(ids, self.sources if weights is None else weights, self.stamps)
        if self.mode == "table":
            flat = folded_table_gather(ids, self.tables)
            return squeeze_patches(flat, self.squeeze_weight, self.squeeze_bias)
        return folded_squeezed_gather(ids, self.tables, self.squeeze_bias)

    def __deepcopy__(self, memo: dict[int, object]) -> FoldedEncoder:
        """For a copy of the weights: the same tables, as fresh or stale as these."""
        sources = copy.deepcopy(self.sources, memo)
        stamps = self.stamps if self.is_stale() else tuple(weight_stamps(sources))
        weight, bias = sources[-2:]
        return FoldedEncoder(self.mode, self.tables, weight, bias, sources, stamps)


def _sources(
    embedding: Tensor,
    blocks: Sequence[GatedFFN],
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
) -> tuple[Tensor, ...]:
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    return (embedding, *parameters, squeeze_weight, squeeze_bias)


def fold_encoder(
    embedding: Tensor,
    blocks: Sequence[GatedFFN],
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    *,
    mode: str = "squeezed",
) -> FoldedEncoder:
    """Tables that stand for embedding, first-stage blocks and (mode ``"squeezed"``) the squeeze.

    Args:
        embedding: [V, H].
        blocks: the position-wise blocks between embedding and flatten.
        squeeze_weight: [H, K*H].
        squeeze_bias: [H].
        mode: ``"table"`` or ``"squeezed"``.

    Raises:
        ValueError: unknown mode, shapes that do not fit.
    """
    if mode not in FOLD_MODES:
        raise ValueError(f"mode: expected one of {', '.join(FOLD_MODES)}; got {mode!r}")
    sources = _sources(embedding, blocks, squeeze_weight, squeeze_bias)
    stamps = tuple(weight_stamps(sources))
    with torch.no_grad(), torch.autocast(embedding.device.type, enabled=False):
        tables = embedding.detach().clone()
        for block in blocks:
            tables = block(tables)
        if mode == "squeezed":
            tables = squeezed_tables(tables, squeeze_weight)
    return FoldedEncoder(mode, tables, squeeze_weight, squeeze_bias, sources, stamps)


def _blocks_per_stage(name: str, num_layers: int) -> int:
    if num_layers < 2 or num_layers % 2:
        raise ValueError(
            f"{name}: expected an even number of at least 2, half for each stage; got {num_layers}"
        )
    return num_layers // 2


def _blocks(num_layers: int, hidden_size: int, intermediate_size: int, eps: float) -> nn.ModuleList:
    return nn.ModuleList(
        GatedFFN(hidden_size, intermediate_size, eps=eps) for _ in range(num_layers)
    )


class PatchEncoder(nn.Module):
    """Token ids of a patch to the mean and log standard deviation of its latent.

    embedding -> blocks (each token on its own) -> flatten -> squeeze -> blocks -> RMSNorm ->
    linear.
    Parameters: ``embed_tokens``, ``encoder_layers.{i}``, ``squeeze_layer``, ``norm``,
    ``hidden_to_latent``.

    Args:
        vocab_size: V.
        hidden_size: H.
        intermediate_size: I of the blocks.
        latent_size: D.
        patch_size: K tokens per patch.
        num_encoder_layers: blocks in all, even: the first half before the squeeze, the rest after.
        token_dropout: in training mode, the probability that a token is replaced by id 0.
        eps: of the norms.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        latent_size: int,
        patch_size: int,
        num_encoder_layers: int = 2,
        token_dropout: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.token_dropout = token_dropout
        self._stage = _blocks_per_stage("num_encoder_layers", num_encoder_layers)
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.encoder_layers = _blocks(num_encoder_layers, hidden_size, intermediate_size, eps)
        self.squeeze_layer = nn.Linear(patch_size * hidden_size, hidden_size)
        self.norm = RMSNorm(hidden_size, eps=eps)
        self.hidden_to_latent = nn.Linear(hidden_size, 2 * latent_size)
        self._folded: FoldedEncoder | None = None

    def forward(
        self, ids: Tensor, seed: int | Tensor | None = None, first_patch: int = 0
    ) -> tuple[Tensor, Tensor]:
        """ids [P, K] -> (mean, log_std), each [P, D].

        Uses the folded tables when there are any and the call is one they can stand for:
        evaluation mode, no gradient wanted for the weights.

        Args:
            ids: int64 or int32 token ids.
            seed: of the token dropout (training mode only); None draws one.
            first_patch: where the patches begin in a larger batch with one seed.

        Raises:
            ValueError: an id outside [0, V) (checked on CPU tensors), a wrong shape.
            RuntimeError: the tables are stale.
        """
        tables = self._usable_tables()
        if tables is None:
            x = self._squeezed(ids, seed, first_patch)
        else:
            x = tables(ids, self._sources())
        for block in self.encoder_layers[self._stage :]:
            x = block(x)
        mean, log_std = self.hidden_to_latent(self.norm(x)).chunk(2, dim=-1)
        return mean, log_std

    def fold(self, mode: str = "squeezed") -> PatchEncoder:
        """Make the tables of :class:`FoldedEncoder`; call it when the weights are final."""
        self._folded = fold_encoder(
            self.embed_tokens.weight,
            self._first_stage(),
            self.squeeze_layer.weight,
            self.squeeze_layer.bias,
            mode=mode,
        )
        return self

    def unfold(self) -> PatchEncoder:
        """Drop the tables."""
        self._folded = None
        return self

    @property
    def folded(self) -> FoldedEncoder | None:
        """The tables, if any."""
        return self._folded

    def is_stale(self) -> bool:
        """Whether there are tables and a weight that they stand for changed after folding."""
        return self._folded is not None and self._folded.is_stale(self._sources())

    def _sources(self) -> tuple[Tensor, ...]:
        squeeze = self.squeeze_layer
        return _sources(self.embed_tokens.weight, self._first_stage(), squeeze.weight, squeeze.bias)

    def _first_stage(self) -> list[GatedFFN]:
        return cast(list[GatedFFN], list(self.encoder_layers[: self._stage]))

    def _usable_tables(self) -> FoldedEncoder | None:
        wants_gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        return None if self.training or wants_gradient else self._folded

    def _squeezed(self, ids: Tensor, seed: int | Tensor | None, first_patch: int) -> Tensor:
        """Embedding, token dropout, first stage, flatten, squeeze: [P, K] -> [P, H]."""
        vocab_size, hidden_size = self.embed_tokens.weight.shape
        dropout = self.token_dropout if self.training else 0.0
        if dropout > 0.0 and first_patch:
            ids, dropout = _with_dropped(ids, dropout, seed, first_patch), 0.0
        table = self.embed_tokens.weight
        # The first stage is a function of the token alone: run it on whichever is fewer.
        once_per_token_of_vocabulary = vocab_size < ids.numel()
        if once_per_token_of_vocabulary:
            for block in self._first_stage():
                table = block(table)
        flat = embed_flatten(ids, table, dropout=dropout, seed=seed)
        if not once_per_token_of_vocabulary:
            x = flat.reshape(-1, hidden_size)
            for block in self._first_stage():
                x = block(x)
            flat = x.reshape(-1, self.patch_size * hidden_size)
        return squeeze_patches(flat, self.squeeze_layer.weight, self.squeeze_layer.bias)


def _with_dropped(
    ids: Tensor, dropout: float, seed: int | Tensor | None, first_patch: int
) -> Tensor:
    """The token dropout of :func:`~calm_kernels.ops.patch_codec.embed_flatten`, with patches
    counted from ``first_patch``."""
    rows = torch.arange(first_patch, first_patch + ids.shape[0], device=ids.device)
    uniforms = philox_uniform(seed, rows, ids.shape[1], Stream.TOKEN_DROPOUT)
    return ids.masked_fill(uniforms < dropout, 0)


class PatchDecoder(nn.Module):
    """A latent vector to the K tokens of its patch.

    linear -> blocks -> expand -> blocks (each token on its own) -> RMSNorm -> vocabulary head.
    Parameters: ``latent_to_hidden``, ``decoder_layers.{i}``, ``expand_layer``, ``norm``,
    ``lm_head_weight`` (an owner ties it to the embedding by assigning that parameter to it).

    Args:
        vocab_size: V.
        hidden_size: H.
        intermediate_size: I of the blocks.
        latent_size: D.
        patch_size: K tokens per patch.
        num_decoder_layers: blocks in all, even: the first half before the expansion, the rest
            after.
        eps: of the norms.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        latent_size: int,
        patch_size: int,
        num_decoder_layers: int = 2,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self._stage = _blocks_per_stage("num_decoder_layers", num_decoder_layers)
        self.latent_to_hidden = nn.Linear(latent_size, hidden_size)
        self.decoder_layers = _blocks(num_decoder_layers, hidden_size, intermediate_size, eps)
        self.expand_layer = nn.Linear(hidden_size, patch_size * hidden_size)
        self.norm = RMSNorm(hidden_size, eps=eps)
        self.lm_head_weight = nn.Parameter(torch.randn(vocab_size, hidden_size) * hidden_size**-0.5)

    def hidden_states(self, latents: Tensor) -> Tensor:
        """What the vocabulary head multiplies: latents [P, D] -> [P*K, H].

        Token k of patch p is row p*K + k. For ``linear_cross_entropy`` or ``linear_argmax`` with
        ``lm_head_weight``.
        """
        x = self.patch_states(latents)
        x = expand_patches(x, self.expand_layer.weight, self.expand_layer.bias, self.patch_size)
        return self._token_states(x)

    def patch_states(self, latents: Tensor) -> Tensor:
        """What the expansion multiplies: latents [P, D] -> [P, H]."""
        x: Tensor = self.latent_to_hidden(latents)
        for block in self.decoder_layers[: self._stage]:
            x = block(x)
        return x

    def decode_places(self, states: Tensor, first: int, stop: int) -> Tensor:
        """The most likely tokens at places ``first`` to ``stop`` - 1 of a patch.

        :meth:`patch_states` [P, H] -> int64 [P, stop - first], columns of what :meth:`decode`
        returns.
        """
        size = states.shape[-1]
        rows = slice(first * size, stop * size)
        layer = self.expand_layer
        x = nn.functional.linear(states, layer.weight[rows], layer.bias[rows])
        tokens = linear_argmax(self._token_states(x.reshape(-1, size)), self.lm_head_weight)
        return tokens.reshape(states.shape[0], stop - first)

    def _token_states(self, x: Tensor) -> Tensor:
        for block in self.decoder_layers[self._stage :]:
            x = block(x)
        states: Tensor = self.norm(x)
        return states

    def forward(self, latents: Tensor) -> Tensor:
        """latents [P, D] -> logits [P, K, V]: large; training and decoding need none."""
        logits: Tensor = nn.functional.linear(self.hidden_states(latents), self.lm_head_weight)
        return logits.reshape(latents.shape[0], self.patch_size, logits.shape[-1])

    def decode(self, latents: Tensor) -> Tensor:
        """latents [P, D] -> the most likely token ids, int64 [P, K], without logits."""
        tokens = linear_argmax(self.hidden_states(latents), self.lm_head_weight)
        return tokens.reshape(latents.shape[0], self.patch_size)
