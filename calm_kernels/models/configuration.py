"""Configurations of the three models, readable from ``config.json`` files old and new.

Unknown keys of a ``config.json`` are kept as plain attributes. Rotary settings may stand at the top
level (``rope_theta``, ``rope_scaling: null``: transformers 4) or in ``rope_parameters``
(transformers 5).
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from transformers import LlamaConfig, PreTrainedConfig

InitScheme = Literal["normal", "width_scaled"]
Estimator = Literal["closed_form", "monte_carlo"]

INIT_SCHEMES = ("normal", "width_scaled")
ESTIMATORS = ("closed_form", "monte_carlo")
HEAD_TYPES = ("energy", "flow", "diffusion")
FLOW_SOLVERS = ("midpoint", "euler")
NOISE_SCHEDULES = ("cosine", "linear")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(
            isinstance(value, int) and value >= 1,
            f"{name}: expected a positive integer; got {value!r}",
        )


def _require_init_scheme(value: str) -> None:
    _require(
        value in INIT_SCHEMES,
        f"init_scheme: expected one of {', '.join(INIT_SCHEMES)}; got {value!r}",
    )


def as_plain_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as plain JSON values, to nest in another one."""
    plain: dict[str, Any] = json.loads(config.to_json_string())
    return plain


class AutoencoderConfig(PreTrainedConfig):
    """Sizes and training settings of :class:`~calm_kernels.models.Autoencoder`.

    Args:
        vocab_size, hidden_size, intermediate_size, latent_size: V, H, I and D.
        patch_size: K, tokens coded by one latent.
        num_encoder_layers, num_decoder_layers: FFN blocks of both stages together: an even number,
            half of them before and half after the tokens of a patch are merged (or split).
        ae_dropout: dropout of the latent in training, and of input tokens.
        token_dropout: dropout of input tokens, where it differs from ``ae_dropout``.
        kl_weight: weight of the KL term in the training loss.
        kl_clamp: lower bound of every latent dimension's KL ("free bits").
        drop_mass: probability mass that the backward pass of the cross entropy may leave out.
        init_scheme: ``"normal"`` draws every weight with std ``initializer_range``;
            ``"width_scaled"`` draws linear layers with std 0.8 / sqrt(fan_in), which small widths
            need.
        tie_word_embeddings: always true: the output weight is the token embedding.

    Raises:
        ValueError: a size is not positive, a layer count is odd, a rate lies outside its range.
    """

    model_type = "calm_autoencoder"

    vocab_size: int = 128257
    hidden_size: int = 512
    intermediate_size: int = 1280
    latent_size: int = 128
    patch_size: int = 4
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    ae_dropout: float = 0.15
    token_dropout: float | None = None
    kl_weight: float = 1e-3
    kl_clamp: float = 0.5
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    init_scheme: str = "normal"
    drop_mass: float = 1e-3
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for unused in ("rope_theta", "rope_scaling"):
            kwargs.pop(unused, None)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.tie_word_embeddings = True
        _require_positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "latent_size", "patch_size"
        )
        for name in ("num_encoder_layers", "num_decoder_layers"):
            layers = getattr(self, name)
            _require(
                layers >= 2 and layers % 2 == 0,
                f"{name}: expected an even number of at least 2 (half of the blocks per stage); "
                f"got {layers}",
            )
        for name in ("ae_dropout", "token_dropout"):
            rate = getattr(self, name)
            _require(
                rate is None or 0.0 <= rate < 1.0, f"{name}: expected a rate in [0, 1); got {rate}"
            )
        _require(0.0 <= self.drop_mass < 1.0, f"drop_mass: expected [0, 1); got {self.drop_mass}")
        _require_init_scheme(self.init_scheme)


class CalmConfig(LlamaConfig):
    """Sizes and training settings of :class:`~calm_kernels.models.EnergyTransformer`.

    The backbone's fields are those of ``LlamaConfig``; positions are patches.

    Args:
        patch_size, latent_size: K and D, those of the autoencoder.
        head_type: ``"energy"``, ``"flow"`` or ``"diffusion"``: what draws the next latent.
        noise_size: width of the uniform noise that the energy head turns into samples.
        num_mlp_layers: blocks of the head.
        num_samples: N, at least 2: samples per position that the energy loss compares; draws of
            target, noise and time per position in the loss of the other heads.
        num_targets: M, posterior draws per position; only the Monte Carlo estimator reads it.
        alpha: exponent of the energy score, 0 < alpha < 2; ``beta`` is accepted as its other name.
        estimator: ``"closed_form"`` or ``"monte_carlo"``: the target term of the energy score.
        sampling_steps: of the flow or diffusion head; its default (10 or 100) if None.
        flow_solver: ``"midpoint"`` or ``"euler"``.
        noise_schedule: of the diffusion head, ``"cosine"`` or ``"linear"``.
        ae_path: folder of the autoencoder, read if neither the checkpoint nor the caller has one.
        autoencoder_config: configuration of the autoencoder that the checkpoint carries.
        init_scheme: as in :class:`AutoencoderConfig`.

    Raises:
        ValueError: a size is not positive, alpha or an option lies outside its range.
    """

    model_type = "calm"
    attribute_map: ClassVar[dict[str, str]] = {"beta": "alpha"}

    vocab_size: int = 128257
    hidden_size: int = 1024
    intermediate_size: int = 2752
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    max_position_embeddings: int = 2048
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    patch_size: int = 4
    latent_size: int = 128
    noise_size: int = 64
    num_mlp_layers: int = 4
    num_samples: int = 8
    num_targets: int = 100
    alpha: float = 1.0
    estimator: str = "closed_form"
    head_type: str = "energy"
    sampling_steps: int | None = None
    flow_solver: str = "midpoint"
    noise_schedule: str = "cosine"
    ae_path: str | None = None
    autoencoder_config: dict[str, Any] | None = None
    init_scheme: str = "normal"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        _require_positive(
            self, "patch_size", "latent_size", "noise_size", "num_mlp_layers", "num_targets"
        )
        _require(
            self.num_samples >= 2,
            f"num_samples: expected at least 2 (a pair is needed); got {self.num_samples}",
        )
        _require(0.0 < self.alpha < 2.0, f"alpha: expected 0 < alpha < 2; got {self.alpha}")
        options = {
            "estimator": ESTIMATORS,
            "head_type": HEAD_TYPES,
            "flow_solver": FLOW_SOLVERS,
            "noise_schedule": NOISE_SCHEDULES,
        }
        for name, choices in options.items():
            value = getattr(self, name)
            _require(
                value in choices, f"{name}: expected one of {', '.join(choices)}; got {value!r}"
            )
        if self.sampling_steps is not None:
            _require_positive(self, "sampling_steps")
            _require(
                self.head_type != "energy",
                "sampling_steps: the energy head draws in one step; leave it out, or choose "
                "head_type flow or diffusion",
            )
        _require_init_scheme(self.init_scheme)


class BaselineConfig(LlamaConfig):
    """Sizes of :class:`~calm_kernels.models.AutoregressiveBaseline`: a Llama language model.

    Args:
        patch_size: K of the models it is compared with; its n-grams start at multiples of K.
        drop_mass, init_scheme: as in :class:`AutoencoderConfig`.
    """

    model_type = "calm_baseline"

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    patch_size: int = 4
    drop_mass: float = 0.0
    init_scheme: str = "normal"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        _require_positive(self, "patch_size")
        _require(0.0 <= self.drop_mass < 1.0, f"drop_mass: expected [0, 1); got {self.drop_mass}")
        _require_init_scheme(self.init_scheme)


def end_token_ids(config: PreTrainedConfig) -> tuple[int, ...]:
    """The ids that end a sequence, none if the configuration names none."""
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
