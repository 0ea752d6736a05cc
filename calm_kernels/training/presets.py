"""Presets: every size and hyper-parameter of a run, by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from calm_kernels.training.errors import UserError


@dataclass(frozen=True)
class Optimization:
    """How long and how one stage is trained. Lengths are in tokens, batches in blocks."""

    steps: int
    batch_size: int
    block_length: int
    learning_rate: float
    warmup_steps: int
    optimizer: str = "adamw"
    """``adamw``, or ``muon``: Muon for the matrices between hidden layers, AdamW for the rest."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: ``cosine`` (to zero at the end) or ``constant``."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    log_every: int = 10
    evaluate_every: int = 100
    save_every: int = 200


@dataclass(frozen=True)
class AutoencoderSettings:
    """Sizes of the autoencoder: H, I, D of the paper."""

    hidden_size: int
    intermediate_size: int
    latent_size: int
    optimization: Optimization
    num_layers: int = 2
    """Encoder and decoder layers each; half of them before the squeeze or after the expansion."""


@dataclass(frozen=True)
class EnergySettings:
    """Sizes of the language model and of its head."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_blocks: int
    noise_size: int
    num_samples: int
    optimization: Optimization
    alpha: float = 1.0
    estimator: str = "closed_form"
    embedding_std: float | None = None
    """Spread of the fresh token embeddings; that of the initialisation scheme if None."""
    num_targets: int = 100
    """Target samples a position; the closed form needs none and ignores it."""
    head_type: str = "energy"
    """``energy``, ``flow`` or ``diffusion``; the energy score's settings are the energy head's."""
    sampling_steps: int | None = None
    """Of the flow or diffusion head; its default if None."""


@dataclass(frozen=True)
class BaselineSettings:
    """Sizes of the autoregressive transformer that CALM is compared with."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    optimization: Optimization


@dataclass(frozen=True)
class EvaluationSettings:
    """How much held-out text is scored, at the end and while training."""

    autoencoder_blocks: int = 512
    brier_blocks: int = 256
    brier_samples: int = 8
    running_autoencoder_blocks: int = 64
    running_brier_blocks: int = 16
    seed: int = 1


@dataclass(frozen=True)
class SampleSettings:
    """The text that a demo generates."""

    prompts: tuple[str, ...] = (
        "My fellow citizens, ",
        "The people of the United States ",
        "During the year ",
    )
    """In bytes multiples of four: a prompt that ends inside a patch costs many more draws."""
    max_new_tokens: int = 200
    temperature: float = 0.5
    num_candidates: int = 200


@dataclass(frozen=True)
class Preset:
    """A whole run: data, models, training, evaluation."""

    name: str
    summary: str
    tokenizer: str | None
    """Tokenizer specification; None where the user has to give a tokenizer.json."""
    patch_size: int
    autoencoder: AutoencoderSettings
    energy: EnergySettings
    baseline: BaselineSettings
    corpus: str = "sotu"
    validation_fraction: float = 0.04
    cpu_bf16: bool = False
    """Train in mixed precision on CPUs that have bfloat16 matmuls; GPUs do in any case."""
    init_scheme: str = "width_scaled"
    """``width_scaled`` (std 0.8/sqrt(fan_in)) learns at small widths, ``normal`` is std 0.02."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)


def _tiny() -> Preset:
    optimization = Optimization(
        steps=30,
        batch_size=4,
        block_length=64,
        learning_rate=3e-3,
        warmup_steps=3,
        log_every=5,
        evaluate_every=15,
        save_every=10,
    )
    return Preset(
        name="tiny",
        summary="seconds on one core; tests the pipeline, learns nothing to speak of",
        tokenizer="bytes",
        patch_size=4,
        validation_fraction=0.2,
        autoencoder=AutoencoderSettings(32, 64, 16, optimization),
        energy=EnergySettings(32, 64, 2, 2, 1, 8, 4, optimization),
        baseline=BaselineSettings(32, 64, 2, 2, optimization),
        evaluation=EvaluationSettings(
            autoencoder_blocks=8,
            brier_blocks=8,
            brier_samples=4,
            running_autoencoder_blocks=4,
            running_brier_blocks=4,
        ),
        sample=SampleSettings(("The people: ",), max_new_tokens=16, num_candidates=16),
    )


def _demo() -> Preset:
    autoencoder = Optimization(
        steps=800,
        batch_size=16,
        block_length=128,
        learning_rate=4e-3,
        warmup_steps=30,
        weight_decay=0.01,
        evaluate_every=100,
    )
    language_model = Optimization(
        steps=400,
        batch_size=12,
        block_length=256,
        learning_rate=3e-3,
        warmup_steps=40,
        optimizer="muon",
    )
    return Preset(
        name="demo",
        summary="bytes, K=4; about seven minutes on two cores",
        tokenizer="bytes",
        patch_size=4,
        cpu_bf16=True,
        autoencoder=AutoencoderSettings(256, 640, 64, autoencoder),
        energy=EnergySettings(256, 672, 4, 4, 2, 64, 4, language_model, embedding_std=0.5),
        baseline=BaselineSettings(256, 672, 4, 4, language_model),
    )


def _small() -> Preset:
    autoencoder = Optimization(
        steps=4000,
        batch_size=16,
        block_length=128,
        learning_rate=4e-3,
        warmup_steps=100,
        weight_decay=0.01,
        log_every=20,
        evaluate_every=250,
        save_every=500,
    )
    language_model = Optimization(
        steps=6000,
        batch_size=16,
        block_length=512,
        learning_rate=3e-3,
        warmup_steps=200,
        optimizer="muon",
        log_every=20,
        evaluate_every=500,
        save_every=500,
    )
    return Preset(
        name="small",
        summary="4096-token BPE, K=4; an hour or two on two cores",
        tokenizer="bpe:4096",
        patch_size=4,
        cpu_bf16=True,
        autoencoder=AutoencoderSettings(256, 640, 128, autoencoder),
        energy=EnergySettings(256, 672, 6, 4, 2, 64, 8, language_model, embedding_std=0.5),
        baseline=BaselineSettings(256, 672, 6, 4, language_model),
    )


def _paper() -> Preset:
    autoencoder = Optimization(
        steps=30_000,
        batch_size=8,
        block_length=2048,
        gradient_accumulation=32,
        learning_rate=3e-4,
        warmup_steps=1000,
        schedule="constant",
        log_every=50,
        evaluate_every=1000,
        save_every=1000,
    )
    language_model = Optimization(
        steps=250_000,
        batch_size=8,
        block_length=8192,
        gradient_accumulation=32,
        learning_rate=3e-4,
        warmup_steps=2000,
        schedule="constant",
        log_every=50,
        evaluate_every=5000,
        save_every=1000,
    )
    return Preset(
        name="paper",
        summary="CALM-M of the paper; give Llama-3's tokenizer.json and a corpus, on GPUs",
        tokenizer=None,
        patch_size=4,
        init_scheme="normal",
        autoencoder=AutoencoderSettings(512, 1280, 128, autoencoder),
        energy=EnergySettings(1024, 2752, 16, 16, 4, 64, 8, language_model),
        baseline=BaselineSettings(1024, 2752, 16, 16, language_model),
    )


PRESETS = {"tiny": _tiny, "demo": _demo, "small": _small, "paper": _paper}


def preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        UserError: no such preset; the message lists those there are.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()


def checked(optimization: Optimization, patch_size: int) -> Optimization:
    """Check the numbers that a user can set.

    Raises:
        UserError: a number out of its range, with the range.
    """
    for name in ("steps", "batch_size", "block_length", "gradient_accumulation"):
        if getattr(optimization, name) < 1:
            raise UserError(
                f"{name.replace('_', ' ')}: expected at least 1; got {getattr(optimization, name)}"
            )
    if not 0 < optimization.learning_rate < float("inf"):
        raise UserError(
            f"learning rate: expected a positive number; got {optimization.learning_rate}"
        )
    if optimization.optimizer not in ("adamw", "muon"):
        raise UserError(f"optimizer: expected adamw or muon; got {optimization.optimizer!r}")
    if optimization.schedule not in ("cosine", "constant"):
        raise UserError(f"schedule: expected cosine or constant; got {optimization.schedule!r}")
    if optimization.block_length % patch_size:
        raise UserError(
            f"block length {optimization.block_length} is not a multiple of the patch size "
            f"{patch_size}: choose, for example, "
            f"{max(1, optimization.block_length // patch_size) * patch_size}"
        )
    if optimization.block_length < 2 * patch_size:
        raise UserError(
            f"block length {optimization.block_length} holds less than two patches of "
            f"{patch_size} tokens: choose at least {2 * patch_size}"
        )
    return optimization


def with_overrides(optimization: Optimization, **values: Any) -> Optimization:
    """A copy with the values that are not None."""
    return replace(optimization, **{name: v for name, v in values.items() if v is not None})


def as_settings(value: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types, for fingerprints and reports."""
    return asdict(value)
