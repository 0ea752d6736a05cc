"""The three generative heads: one interface, each learns a law, each is saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calm_kernels.models import CalmConfig, EnergyTransformer
from calm_kernels.models.heads import Head, make_head, training_loss
from calm_kernels.nn import DiffusionHead, EnergyLoss, FlowHead
from calm_kernels.nn.denoiser import normals_of, training_draws
from calm_kernels.nn.diffusion_head import signal_powers
from calm_kernels.reference import philox

HEAD_TYPES = ("energy", "flow", "diffusion")
H, D = 16, 3
MakeEnergyTransformer = Callable[..., EnergyTransformer]


def head_of(head_type: str, hidden_size: int = H, latent_size: int = D, **settings: Any) -> Head:
    config = CalmConfig(
        hidden_size=hidden_size, num_attention_heads=1, latent_size=latent_size, num_mlp_layers=2,
        noise_size=8, head_type=head_type, **settings,
    )  # fmt: skip
    return make_head(config)


def perturbed(head: Head) -> Head:
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head


def loss_of(head: Head, hidden: Tensor, mean: Tensor, log_std: Tensor, **kwargs: Any) -> Tensor:
    arguments: dict[str, Any] = {"mask": None, "seed": torch.tensor([1]), **kwargs}
    return training_loss(head, EnergyLoss(), 4, hidden, mean, log_std, **arguments)


MODES = torch.tensor([[[2.0, 0.0], [-2.0, 0.0]], [[0.0, 2.0], [0.0, -2.0]]])
SPREAD = 0.3


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_every_head_learns_a_conditional_mixture(head_type: str) -> None:
    """Two kinds of hidden state, two Gaussians (standard deviation 0.3) for each, alike probable.

    Of a trained head's draws at least 85% lie within 1.0 of a mode of their own kind (of the exact
    law 99.6%, of a head that ignores the hidden state at most 50%), at least 30% at each mode.
    """
    torch.manual_seed(3)
    states = torch.randn(2, 32)
    head = head_of(head_type, 32, 2)
    optimizer = torch.optim.Adam(head.parameters(), lr=4e-3)
    steps, positions = 400, 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    log_std = torch.full((positions, 2), math.log(SPREAD))
    for step in range(steps):
        kind = torch.randint(0, 2, (positions,))
        mean = MODES[kind, torch.randint(0, 2, (positions,))]
        optimizer.zero_grad()
        loss_of(head, states[kind], mean, log_std, seed=torch.tensor([step])).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        draws = head(states, 400, seed=5)
    distances = (draws.unsqueeze(2) - MODES).norm(dim=-1)
    near = (distances < 1.0).float().mean(dim=0)
    assert near.sum(dim=1).min() >= 0.85, near
    assert near.min() >= 0.3, near


@pytest.mark.parametrize("head_type", HEAD_TYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_draws_have_the_number_asked_for_and_follow_the_seed(
    head_type: str, shape: tuple[int, ...]
) -> None:
    head, hidden = perturbed(head_of(head_type)), torch.randn(*shape, H)
    draws = head(hidden, 7, seed=3)
    assert draws.shape == (7, *shape, D)
    assert torch.equal(draws, head(hidden, 7, seed=torch.tensor([3])))
    assert not torch.equal(draws, head(hidden, 7, seed=4))
    assert torch.isfinite(draws).all()
    assert (draws.std(dim=0) > 0).all()
    noise = head.draw_noise(math.prod(shape), 7, hidden.device, 3)
    assert torch.equal(draws, head(hidden, 7, noise=noise.reshape(7, *shape, -1)))


@pytest.mark.parametrize("head_type", ["flow", "diffusion"])
def test_a_draw_does_not_depend_on_those_beside_it(head_type: str) -> None:
    head, hidden = perturbed(head_of(head_type)), torch.randn(6, H)
    noise = head.draw_noise(6, 5, hidden.device, 3)
    alone = head(hidden[2:3], 2, noise=noise[3:5, 2:3])
    torch.testing.assert_close(alone, head(hidden, 5, noise=noise)[3:5, 2:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_the_loss_reaches_hidden_and_every_parameter(head_type: str) -> None:
    head = perturbed(head_of(head_type))
    hidden = torch.randn(2, 4, H, requires_grad=True)
    mean, log_std = torch.randn(2, 4, D), torch.randn(2, 4, D) - 1
    loss_of(head, hidden, mean, log_std).backward()
    assert hidden.grad is not None and (hidden.grad.abs().amax(-1) > 0).all()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_masked_positions_touch_neither_loss_nor_gradient(head_type: str) -> None:
    head = perturbed(head_of(head_type))
    mask = torch.tensor([True, True, False])
    mean, log_std, hidden = torch.randn(3, D), torch.randn(3, D) - 1, torch.randn(3, H)
    expected = loss_of(head, hidden, mean, log_std, mask=mask)
    broken = hidden.clone()
    if head_type != "energy":
        broken[2] = math.nan
    mean[2], log_std[2] = math.nan, math.nan
    broken.requires_grad_()
    actual = loss_of(head, broken, mean, log_std, mask=mask)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    assert broken.grad is not None and broken.grad[2].eq(0).all()
    nothing = loss_of(head, hidden, mean, log_std, mask=torch.zeros(3, dtype=torch.bool))
    assert nothing == 0


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_num_samples_of_the_configuration_is_used(
    make_energy_transformer: MakeEnergyTransformer,
    head_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_energy_transformer(head_type=head_type, num_samples=6)
    counts = []
    for name in ("forward", "loss"):
        if (method := getattr(model.mlp_generator, name, None)) is None:
            continue

        def counting(*args: Any, _method: Any = method, **kwargs: Any) -> Any:
            counts.append(kwargs.get("num_samples", args[1] if len(args) > 1 else None))
            return _method(*args, **kwargs)

        monkeypatch.setattr(model.mlp_generator, name, counting)
    model(torch.randint(0, 23, (2, 16)), seed=1)
    assert counts == [6]


@pytest.mark.parametrize("head_type", ["flow", "diffusion"])
def test_models_with_other_heads_are_saved_scored_and_generate(
    make_energy_transformer: MakeEnergyTransformer, head_type: str, tmp_path: Path
) -> None:
    model = make_energy_transformer(head_type=head_type, sampling_steps=3)
    model.save_pretrained(tmp_path)
    loaded = EnergyTransformer.from_pretrained(tmp_path)
    assert loaded.config.head_type == head_type
    assert type(loaded.mlp_generator) is {"flow": FlowHead, "diffusion": DiffusionHead}[head_type]
    assert loaded.mlp_generator.steps == 3
    ids = torch.randint(0, 23, (2, 16))
    assert torch.equal(model(ids, seed=4).loss, loaded(ids, seed=4).loss)
    scores = [m.evaluate_brier(ids, num_samples=3, seed=2).scores for m in (model, loaded)]
    assert torch.equal(*scores)
    texts = [
        m.generate(ids[:, :8], max_new_tokens=8, temperature=0.5, num_candidates=5, seed=2)
        for m in (model, loaded)
    ]
    assert torch.equal(texts[0].sequences, texts[1].sequences)


def test_a_fresh_flow_draws_normals() -> None:
    """Of a network that gives zero, the flow stands still."""
    head = FlowHead(H, D)
    noise = torch.rand(4, 5, D) - 0.5
    torch.testing.assert_close(head(torch.randn(5, H), 4, noise=noise), normals_of(noise))


class Rotation(torch.nn.Module):
    """The velocity field (-y, x) turned by one radian in unit time."""

    def condition(self, hidden: Tensor) -> Tensor:
        return hidden.unsqueeze(1)

    def forward(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        return torch.stack((-x[..., 1], x[..., 0]), dim=-1)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
def test_solvers_converge_with_their_order(solver: str, order: int) -> None:
    noise = torch.rand(9, 6, 2, dtype=torch.float64) - 0.5
    x, y = normals_of(noise).unbind(-1)
    cosine, sine = math.cos(1), math.sin(1)
    exact = torch.stack((cosine * x - sine * y, sine * x + cosine * y), dim=-1)
    errors = []
    for steps in (10, 20):
        head = FlowHead(H, 2, 1, steps, solver)
        head.net = Rotation()  # type: ignore[assignment]
        errors.append((head(torch.randn(6, H), 9, noise=noise) - exact).abs().max())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


class ExactNetwork(torch.nn.Module):
    """What a perfect network gives if the latent is N(mean, spread^2) in every element."""

    def __init__(self, head: DiffusionHead, mean: float, spread: float) -> None:
        super().__init__()
        self.powers = signal_powers(head.schedule, head.training_steps).float()
        self.steps, self.mean, self.spread = head.training_steps, mean, spread

    def condition(self, hidden: Tensor) -> Tensor:
        return hidden.unsqueeze(1)

    def forward(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        power = self.powers[(times * self.steps).round().long()].unsqueeze(-1)
        signal, variance = power.sqrt(), self.spread**2
        gain = signal * variance / (power * variance + 1 - power)
        clean = self.mean + gain * (x - signal * self.mean)
        noise = (x - signal * clean) / (1 - power).sqrt()
        return signal * noise - (1 - power).sqrt() * clean


@pytest.mark.parametrize(("steps", "short"), [(100, 0.08), (1000, 0.01)])
def test_diffusion_with_an_exact_network_draws_the_law(steps: int, short: float) -> None:
    """24000 draws of N(1.5, 0.3^2): the mean within five standard errors, the spread too, after
    what the steps leave out. A step's variance is that of a known latent, so draws spread less."""
    head = DiffusionHead(H, D, 1, steps)
    head.net = ExactNetwork(head, 1.5, 0.3)  # type: ignore[assignment]
    draws = head(torch.randn(4, H), 2000, seed=3)
    assert abs(draws.mean() - 1.5) < 5 * 0.3 / 24000**0.5 + 0.003
    spread, error = draws.std() / 0.3, 5 / (2 * 24000) ** 0.5
    assert 1 - short - error < spread < 1 + error


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_fall_from_signal_to_noise(schedule: str) -> None:
    powers = signal_powers(schedule, 1000)
    assert (powers.diff() < 0).all()
    assert powers[0] > 0.999 and powers[-1] < 1e-4
    if schedule == "cosine":
        middle = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2
        first = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        torch.testing.assert_close(powers[499].item(), middle / first)


def test_the_diffusion_loss_is_the_error_of_the_noise() -> None:
    head = perturbed(DiffusionHead(H, D, 2)).double()
    hidden = torch.randn(5, H, dtype=torch.float64)
    mean, log_std = (torch.randn(5, D, dtype=torch.float64) for _ in range(2))
    draws = training_draws(mean, log_std, 3, 9)
    numbers = (draws.times * 1000).long()
    power = signal_powers("cosine", 1000)[numbers].unsqueeze(-1)
    x = power.sqrt() * draws.targets + (1 - power).sqrt() * draws.noise
    v = head.net(x, numbers / 1000, head.net.condition(hidden))
    found = (1 - power).sqrt() * x + power.sqrt() * v
    expected = (found - draws.noise).square().mean()
    torch.testing.assert_close(head.loss(hidden, mean, log_std, num_samples=3, seed=9), expected)


def test_training_draws_follow_their_streams() -> None:
    mean, log_std = torch.randn(4, D), torch.randn(4, D)
    draws = training_draws(mean, log_std, 5, 8)
    seed = torch.tensor([8])
    spread = philox.normal(seed, torch.arange(4), 5 * D, philox.Stream.ENERGY_TARGETS)
    expected = mean[:, None] + log_std.exp()[:, None] * spread.reshape(4, 5, D)
    torch.testing.assert_close(draws.targets, expected)
    rows, stream = torch.arange(20).reshape(4, 5), philox.Stream.HEAD_NOISE
    torch.testing.assert_close(draws.noise, philox.normal(seed, rows, D, stream))
    expected = philox.uniform(seed, rows, 1, stream, first=4)[..., 0]
    torch.testing.assert_close(draws.times, expected)


def test_normals_of_uniforms_have_the_normal_quantiles() -> None:
    uniforms = torch.tensor([-0.5, -0.4, 0.0, 0.3413447, 0.5])
    normals = normals_of(uniforms)
    torch.testing.assert_close(normals[1:4], torch.tensor([-1.2815516, 0.0, 1.0]))
    assert torch.isfinite(normals).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_type": "gan"}, "head_type"),
        ({"sampling_steps": 5}, "sampling_steps"),
        ({"head_type": "flow", "sampling_steps": 0}, "sampling_steps"),
        ({"head_type": "flow", "flow_solver": "heun"}, "flow_solver"),
        ({"head_type": "diffusion", "noise_schedule": "square"}, "noise_schedule"),
        ({"head_type": "diffusion", "sampling_steps": 1001}, "steps"),
    ],
)
def test_settings_that_no_head_can_honour_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_head(CalmConfig(**settings))


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"hidden": torch.zeros(2, H + 1)}, "hidden"),
        (ValueError, {"mean": torch.zeros(3, D)}, "mean"),
        (TypeError, {"log_std": torch.zeros(2, D, dtype=torch.int64)}, "log_std"),
        (ValueError, {"mask": torch.ones(3, dtype=torch.bool)}, "mask"),
        (ValueError, {"num_samples": 0}, "num_samples"),
    ],
)
def test_losses_name_what_is_wrong(
    error: type[Exception], arguments: dict[str, Any], message: str
) -> None:
    valid = {"hidden": torch.zeros(2, H), "mean": torch.zeros(2, D), "log_std": torch.zeros(2, D)}
    with pytest.raises(error, match=message):
        FlowHead(H, D).loss(**{**valid, "num_samples": 2, **arguments})
