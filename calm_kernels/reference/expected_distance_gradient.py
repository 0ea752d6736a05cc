"""E ||offset + std * eps||^alpha and its gradients in one pass, as the kernels compute them.

The names are those of :mod:`calm_kernels.reference.expected_distance`. T = mu^a F, where F is a
function of rho, of k3 and k4 (third and fourth cumulant over powers of mu) and, through the nodes,
of e_d and w_d. The chain rule gives, with F_x for dF/dx,

    dT/d delta_d = 2 delta_d mu^(a-1) [ A + 4 w F_rho + 24 w^2 F_k3 + 192 w^3 F_k4 + F_e ]
    dT/d log s_d = 2 w mu^a [ A + 4 (w+e) F_rho + 24 w (w+2e) F_k3 + 192 w^2 (w+3e) F_k4 + F_w ]
    A = a F - 2 rho F_rho - 3 k3 F_k3 - 4 k4 F_k4 - sum_d (e F_e + w F_w).

Without nodes both are cubics in w_d: four sums and one polynomial per element are all that a
position costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calm_kernels.reference.expected_distance import (
    CORRECTION_RULES,
    GAMMA_SHIFT,
    Rule,
    UnitMeanLaw,
    correction_nodes,
    gamma_moment_ratio,
    gamma_ratio_coefficients,
    power_of_square,
    series_coefficients,
    series_terms,
)


@dataclass
class Factor:
    """F and its derivatives, each [N, P]."""

    value: Tensor
    rho: Tensor
    third: Tensor
    fourth: Tensor
    projection: Tensor
    """sum_d (e F_e + w F_w)"""


@dataclass
class Correction:
    """What the nodes add for the S entries that take them."""

    value: Tensor
    rho: Tensor
    projection: Tensor
    e: Tensor
    """F_e [S, D]"""
    w: Tensor
    """F_w [S, D]"""


def gamma_moment_ratio_log_slope(rho: Tensor, a: float) -> Tensor:
    """d ln R / d rho of :func:`gamma_moment_ratio`."""
    shift = GAMMA_SHIFT - 0.5 * (1.0 - a)
    w = 1.0 + shift * rho
    j = torch.arange(GAMMA_SHIFT, dtype=rho.dtype, device=rho.device)
    one_j_rho = 1.0 + rho.unsqueeze(-1) * j
    recurrence = (one_j_rho * (one_j_rho + a * rho.unsqueeze(-1))).reciprocal().sum(-1)
    x = (rho / w).square()
    c1, c2, c3, c4 = gamma_ratio_coefficients(a)
    series = c1 + x * (2.0 * c2 + x * (3.0 * c3 + x * (4.0 * c4)))
    return a * (shift / w - recurrence) + 2.0 * rho / w**3 * series


def series_factor(law: UnitMeanLaw, nodes: Tensor, a: float) -> Factor:
    """F = R (1 + c3 (k3 - 2 rho^2) + c4 (k4 - 6 rho^3)) where nodes == 0, F = R elsewhere."""
    matched = gamma_moment_ratio(law.rho, a)
    serves = nodes == 0
    rho = torch.where(serves, law.rho, 0.0)
    c3, c4 = series_coefficients(rho, a)
    skewness, kurtosis = series_terms(UnitMeanLaw(law.e, law.w, rho, law.third, law.fourth), a)
    # Each factor of a coefficient's divisor adds its own term to the logarithmic derivative.
    divisor_3 = rho.new_zeros(())
    for j in (1, 2, 3):
        divisor_3 = divisor_3 + (j - a) / (1.0 - (j - a) * rho)
    divisor_4 = divisor_3 + (4.0 - a) / (1.0 - (4.0 - a) * rho)
    series_rho = divisor_3 * skewness + divisor_4 * kurtosis - rho * (4.0 * c3 + 18.0 * rho * c4)
    series = torch.where(serves, 1.0 + skewness + kurtosis, 1.0)
    series_rho = torch.where(serves, series_rho, 0.0)
    return Factor(
        value=matched * series,
        rho=matched * (gamma_moment_ratio_log_slope(law.rho, a) * series + series_rho),
        third=torch.where(serves, matched * c3, 0.0),
        fourth=torch.where(serves, matched * c4, 0.0),
        projection=torch.zeros_like(matched),
    )


def correction_by_rule(e: Tensor, w: Tensor, rho: Tensor, a: float, rule: Rule) -> Correction:
    """The correction of :func:`quadrature_correction` and its derivatives: e, w [S, D], rho [S]."""
    per_entry, per_element = torch.zeros_like(rho), torch.zeros_like(e)
    out = Correction(
        per_entry, per_entry.clone(), per_entry.clone(), per_element, per_element.clone()
    )
    for t, weight in rule.nodes(a):
        log_matched = -torch.log1p(t * rho) / rho
        matched = weight * torch.exp(log_matched)
        spread = (2.0 * t) * w
        inverse = (1.0 + spread).reciprocal()
        damped = e * inverse
        # Not the logarithm of a sum or product: thousands of small w_d would each lose digits.
        log_actual = -(0.5 * spread.log1p_() + t * damped).sum(-1)
        actual = weight * torch.exp(log_actual)
        out.value += matched - actual
        out.rho -= matched * (log_matched + t / (1.0 + t * rho)) / rho
        # -d ln phi / d e = t inverse, -d ln phi / d w = t inverse (1 - 2 t e inverse).
        slope_e = inverse.mul_((t * actual).unsqueeze(-1))
        slope_w = slope_e * (1.0 - (2.0 * t) * damped)
        out.e += slope_e
        out.w += slope_w
        out.projection += (e * slope_e + w * slope_w).sum(-1)
    return out


def _unit_mean_law(direction: Tensor, variance: Tensor, safe_mu: Tensor) -> UnitMeanLaw:
    """As :func:`unit_mean_law`, with the sums that do not depend on the sample taken once."""
    trace = variance.sum(-1)
    relative = variance / trace.masked_fill(trace == 0, 1.0).unsqueeze(-1)
    share = trace / safe_mu
    e, w = direction.square(), relative * share.unsqueeze(-1)
    squares, mixed = relative.square(), e * w
    rho = 2.0 * share.square() * squares.sum(-1) + 4.0 * mixed.sum(-1)
    cubes, mixed = squares * relative, mixed.mul_(w)
    third = 8.0 * share**3 * cubes.sum(-1) + 24.0 * mixed.sum(-1)
    fourths, mixed = cubes * relative, mixed.mul_(w)
    fourth = 48.0 * share**4 * fourths.sum(-1) + 192.0 * mixed.sum(-1)
    return UnitMeanLaw(e, w, rho, third, fourth)


def _corrections(
    law: UnitMeanLaw, nodes: Tensor, factor: Factor, a: float
) -> list[tuple[tuple[Tensor, ...], Correction]]:
    """The corrections by nodes, already added to ``factor``, with the entries that took them."""
    corrections = []
    for rule in CORRECTION_RULES:
        taken = (nodes == rule.count).nonzero(as_tuple=True)
        if taken[0].numel() == 0:
            continue
        correction = correction_by_rule(law.e[taken], law.w[taken], law.rho[taken], a, rule)
        factor.value[taken] += correction.value
        factor.rho[taken] += correction.rho
        factor.projection[taken] = correction.projection
        corrections.append((taken, correction))
    return corrections


def expected_distance_power_with_gradients(
    offset: Tensor, std: Tensor, alpha: float, needs_offset: bool, needs_log_std: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The value, and the gradients of its sum over samples.

    Args:
        offset: [N, P, D], float32 or float64.
        std: [P, D], at least zero.
        alpha: exponent in (0, 2).
        needs_offset, needs_log_std: whether the second and the third result are wanted.

    Returns:
        value [N, P], gradient in offset [N, P, D] or None, gradient in log(std) [P, D] or None.
    """
    a = alpha / 2.0
    variance = std.square()
    mu = offset.square().sum(-1) + variance.sum(-1)
    safe = mu.masked_fill(mu == 0, 1.0)
    # 1 / mu is used as two factors 1 / sqrt(mu), which do not overflow where distances are tiny.
    inverse_distance = safe.rsqrt().unsqueeze(-1)
    direction = offset * inverse_distance
    law = _unit_mean_law(direction, variance, safe)
    e, w = law.e, law.w
    nodes = correction_nodes(law, a)
    factor = series_factor(law, nodes, a)
    corrections = _corrections(law, nodes, factor, a)
    power = power_of_square(mu, a)
    value = power * factor.value
    if not (needs_offset or needs_log_std):
        return value, None, None

    scale = 2.0 * power
    c0, c1, c2, c3 = (
        (scale * coefficient).unsqueeze(-1)
        for coefficient in (
            _homogeneous_slope(law, factor, a),
            4.0 * factor.rho,
            24.0 * factor.third,
            192.0 * factor.fourth,
        )
    )
    slope_e = (c3 * w).add_(c2).mul_(w).add_(c1).mul_(w).add_(c0)
    grad_log_std = None
    if needs_log_std:
        slope_w = (3.0 * c3 * w).add_(2.0 * c2).mul_(w).add_(c1).mul_(e).add_(slope_e)
        for taken, correction in corrections:
            slope_w[taken] += scale[taken].unsqueeze(-1) * correction.w
        grad_log_std = slope_w.mul_(w).sum(0)
    for taken, correction in corrections:
        slope_e[taken] += scale[taken].unsqueeze(-1) * correction.e
    return value, slope_e.mul_(direction).mul_(inverse_distance), grad_log_std


def _homogeneous_slope(law: UnitMeanLaw, factor: Factor, a: float) -> Tensor:
    """A: mu^(1-a) dT/d mu at fixed delta and s."""
    return (
        a * factor.value
        - 2.0 * law.rho * factor.rho
        - 3.0 * law.third * factor.third
        - 4.0 * law.fourth * factor.fourth
        - factor.projection
    )
