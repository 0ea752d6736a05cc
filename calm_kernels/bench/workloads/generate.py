"""``generate``: continuing prompts at a temperature, a vote among N draws for every patch.

A call is a whole continuation: the latency of a step is its time over new/K, and B * new tokens
come of it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from calm_kernels.bench import checks, plain
from calm_kernels.bench.models import (
    PATCH_SIZE,
    make_language_model,
    products,
)
from calm_kernels.bench.variants import eager, ours
from calm_kernels.bench.workload import (
    Case,
    Check,
    Cost,
    Inputs,
    Outputs,
    Setting,
    Size,
    Workload,
    register,
)
from calm_kernels.models import EnergyTransformer
from calm_kernels.models.draws import noise_rows
from calm_kernels.models.sequences import seed_of_step
from calm_kernels.ops.random import philox_uniform
from calm_kernels.reference.philox import Stream
from calm_kernels.reference.temperature_sampling import wide_uniform

PROMPT = 64
BOUND = {torch.float32: 0.0, torch.bfloat16: 0.25}
"""Share of patches that may differ from those chosen in wider arithmetic after the same tokens.
In bfloat16 some draws decode to a neighbouring token, and a vote can turn on one of them."""


def _settings(
    name: str, batches: tuple[int, ...], draws: int, new: int, dtype: torch.dtype
) -> tuple[Setting, ...]:
    sizes: dict[str, Size] = {"preset": name, "N": draws, "T": 0.5, "new": new}
    return tuple(Setting({"B": batch, **sizes}, dtype) for batch in batches)


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    name = str(case.shape["preset"])
    return {
        "model": make_language_model(name, generator, case.dtype, case.device).train(False),
        "draws": case.size("N"),
        "new": case.size("new"),
        "temperature": float(case.shape["T"]),
        "exponent": round(1.0 / float(case.shape["T"])),
    }


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    """Prompts and a seed, and the seed's random numbers as the plain formulation takes them."""
    model: EnergyTransformer = state["model"]
    batch, draws, device = case.size("B"), case.size("N"), case.device
    shape = (batch, PROMPT)
    prompt = torch.randint(0, model.config.vocab_size, shape, generator=generator, device=device)
    seed = int(torch.randint(0, 2**62, (1,), generator=generator, device=device))
    width = model.config.noise_size
    sequences = torch.arange(batch, device=device)
    rows = noise_rows(sequences, 0, draws)
    noise, uniforms = [], []
    for step in range(case.size("new") // PATCH_SIZE):
        step_seed = torch.tensor([seed_of_step(seed, step)], device=device)
        uniform = philox_uniform(step_seed, rows, width, Stream.HEAD_NOISE)
        noise.append(uniform.reshape(draws, batch, width) - 0.5)
        zeros = torch.zeros_like(sequences)
        votes = wide_uniform(step_seed, sequences, zeros, 1, Stream.BATCH_TEMPERATURE)
        uniforms.append(votes.flatten().tolist())
    return {"prompt": prompt, "seed": seed, "noise": torch.stack(noise), "uniforms": uniforms}


def plain_generation(inputs: Inputs) -> Tensor:
    """A cache that grows, all candidates' logits, one Counter a sequence and step."""
    names = ("model", "prompt", "noise", "exponent", "uniforms")
    return plain.generate(*(inputs[name] for name in names))


def package(inputs: Inputs) -> Tensor:
    model: EnergyTransformer = inputs["model"]
    output = model.generate(
        inputs["prompt"],
        max_new_tokens=inputs["new"],
        temperature=inputs["temperature"],
        num_candidates=inputs["draws"],
        seed=inputs["seed"],
    )
    return output.sequences[:, PROMPT:].clone()


def exact(case: Case, inputs: Inputs) -> EnergyTransformer:
    """The model in wider arithmetic."""
    model: EnergyTransformer = copy.deepcopy(inputs["model"])
    wider = torch.float64 if case.dtype == torch.float32 else torch.float32
    torch.nn.Module.to(model, dtype=wider)
    return model


@torch.no_grad()
def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """Every patch against the one that the plain formulation chooses after the same tokens."""
    expected_shape = (case.size("B"), case.size("new"))
    if outputs.shape != expected_shape:
        return Check(1.0, BOUND[case.dtype], checks.MISMATCHES)
    chosen = outputs.unflatten(1, (-1, PATCH_SIZE))
    before = inputs["prompt"].unflatten(1, (-1, PATCH_SIZE))
    hidden = plain.hidden_states(exact, torch.cat((before, chosen[:, :-1]), dim=1))
    wrong = 0
    for step, (noise, uniforms) in enumerate(zip(inputs["noise"], inputs["uniforms"], strict=True)):
        for b in range(case.size("B")):
            now = hidden[b : b + 1, before.shape[1] - 1 + step]
            draws = plain.candidates(exact, now, noise[:, b : b + 1])
            (patch,) = plain.vote(draws, inputs["exponent"], uniforms[b : b + 1])
            wrong += patch != chosen[b, step].tolist()
    return Check(wrong / (chosen.shape[0] * chosen.shape[1]), BOUND[case.dtype], checks.MISMATCHES)


def cost(case: Case) -> Cost:
    """Every step reads all weights; head and decoder for every draw. The prompt is left out.

    The package decodes less where draws drop out of the vote early, so it can pass this limit.
    """
    each = products(str(case.shape["preset"]))
    batch, draws, steps = case.size("B"), case.size("N"), case.size("new") // PATCH_SIZE
    tokens = each.decode_token + each.vocabulary
    weights = each.backbone + each.head_position + each.head_sample + each.decode_patch + tokens
    per_draw = each.head_sample + each.decode_patch + PATCH_SIZE * tokens
    operations = batch * (each.backbone + each.head_position + draws * per_draw)
    width = torch.empty(0, dtype=case.dtype).element_size()
    return Cost(steps * width * weights, 2 * steps * operations, case.dtype)


register(
    Workload(
        name="generate",
        summary="continuing prompts, N draws a patch; one step takes the time over new/K",
        settings={
            "small": _settings("tiny", (2,), 20, 16, torch.float32),
            "cpu": _settings("demo", (1, 8), 200, 64, torch.float32),
            "cuda": _settings("paper", (1, 8, 32), 200, 64, torch.bfloat16),
        },
        make_state=make_state,
        make_inputs=make_inputs,
        variants=(eager(plain_generation), ours(package)),
        exact=exact,
        check=check,
        cost=cost,
    )
)
