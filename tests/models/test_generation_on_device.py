"""The steps that run without the host give the tokens of those that run with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from calm_kernels.models import EnergyTransformer, cached_backbone, generation
from calm_kernels.models.cached_backbone import DynamicBackbone, StaticBackbone, why_not_static
from calm_kernels.models.device_steps import DeviceSteps
from calm_kernels.models.draws import Drawer
from calm_kernels.models.sequences import GenerationOutput

MakeModel = Callable[..., EnergyTransformer]
FIELDS = tuple(GenerationOutput.__dataclass_fields__)


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 22, (n,), generator=generator).tolist() for n in lengths]


def with_host(model: EnergyTransformer, prompts: list[list[int]], **options: Any) -> Any:
    """Generation with transformers' cache and the host between all steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            generation, "make_backbone", lambda m, contexts, _: DynamicBackbone(m, contexts)
        )
        patch.setattr(generation, "DeviceSteps", None)
        return model.generate(prompts, **options)


def assert_same(output: GenerationOutput, expected: GenerationOutput) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(output, name), getattr(expected, name)), name


class Recording:
    """What a CUDA graph is to a GPU: the operations of one step, all else as it was then."""

    replays = 0

    def __init__(self, steps: DeviceSteps) -> None:
        before = {t: t.clone() for t in (steps._last, steps._step, steps._backbone._position)}
        with pytest.MonkeyPatch.context() as patch:
            # Values are checked on the CPU alone, and not while tracing; a look is an error here.
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            self._graph = make_fx(lambda: steps._feed_and_draw())()
        for tensor, value in before.items():
            tensor.copy_(value)

    def replay(self) -> None:
        Recording.replays += 1
        with torch.no_grad():
            self._graph()


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on a CPU, or with a recording in place of a CUDA graph and rare looks at results."""
    if request.param == "as on a GPU":

        def record(steps: DeviceSteps) -> None:
            steps._graph = Recording(steps)  # type: ignore[assignment]

        monkeypatch.setattr(StaticBackbone, "capturable", True)
        monkeypatch.setattr(DeviceSteps, "_record", record)
        monkeypatch.setattr(Recording, "replays", 0)
    return str(request.param)


TEMPERATURES = [1.0, 0.5, 0.37, torch.tensor([0.5, 1.0, 0.2]), torch.tensor([0.9, 1.0, 1.0])]


@pytest.mark.parametrize(
    ("patch_size", "temperature"), [(1, 0.5), *((4, t) for t in TEMPERATURES)], ids=str
)
def test_tokens_are_those_of_steps_with_the_host(
    make_model: MakeModel, mode: str, patch_size: int, temperature: Any
) -> None:
    model = make_model(patch_size).double()
    lengths = [3 * patch_size, patch_size, 7 * patch_size]
    for seed in (1, 2):
        prompts = prompts_of(lengths, seed)
        options = {
            "max_new_tokens": 11 * patch_size - patch_size // 2,
            "temperature": temperature,
            "num_candidates": 25,
            "seed": seed,
        }
        assert_same(model.generate(prompts, **options), with_host(model, prompts, **options))
    assert mode == "as on a CPU" or Recording.replays > 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ends_and_ragged_prompts_give_the_same_tokens_too(
    make_model: MakeModel, mode: str, temperature: float
) -> None:
    model = make_model(4, pad_token_id=22, eos_token_id=[2, 3, 8, 15]).double()
    inside, finished = 0, 0
    for seed in range(2):
        prompts = prompts_of([8, 5, 12, 4, 9, 4], seed)
        options: dict[str, Any] = {
            "max_new_tokens": 45,
            "temperature": temperature,
            "num_candidates": 20,
            "max_draws": 200,
            "seed": seed,
        }
        output = model.generate(prompts, **options)
        assert_same(output, with_host(model, prompts, **options))
        finished += int(output.finished.sum())
        inside += int((output.lengths[output.finished] % 4 != 0).sum())
    assert finished > 2 and inside > 0


def test_memory_that_moves_as_sequences_grow_keeps_the_tokens(
    make_model: MakeModel, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_backbone, "SMALLEST_CAPACITY", 2)
    model = make_model(2).double()
    prompts = prompts_of([2, 6], 3)
    options = {"max_new_tokens": 24, "temperature": 0.5, "num_candidates": 12, "seed": 5}
    assert_same(model.generate(prompts, **options), with_host(model, prompts, **options))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 12},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [[16, 16], [8, 20, 4], [12, 160]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_static_backbone_gives_the_hidden_states_of_transformers(
    make_model: MakeModel, settings: dict[str, Any], lengths: list[int], dtype: torch.dtype
) -> None:
    model = make_model(4, **settings).to(dtype)
    assert why_not_static(model) is None
    contexts = prompts_of(lengths, 1)
    patches = torch.randint(0, 22, (70, len(lengths), 4))
    with torch.no_grad():
        dynamic = DynamicBackbone(model, contexts)
        static = StaticBackbone(model, contexts, 70)
        torch.testing.assert_close(static.hidden, dynamic.hidden, rtol=1e-5, atol=1e-5)
        for patch in patches:
            expected, hidden = dynamic.feed(patch), static.feed(patch)
            assert hidden is static.hidden
            # transformers' norms round to float32, whatever the dtype.
            torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_static_backbone_works_in_every_precision(
    make_model: MakeModel, dtype: torch.dtype, autocast: bool
) -> None:
    model = make_model(4)
    contexts, patches = prompts_of([8, 4], 1), torch.randint(0, 22, (5, 2, 4))
    with torch.no_grad():
        exact = DynamicBackbone(model.double(), contexts)
        expected = [exact.feed(patch) for patch in patches]
    rounding = 2e-2 if autocast or dtype == torch.bfloat16 else 1e-5
    model.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        static = StaticBackbone(model, contexts, 5)
        for patch, exact_hidden in zip(patches, expected, strict=True):
            difference = static.feed(patch).double() - exact_hidden
            assert float(difference.norm() / exact_hidden.norm()) < rounding


def test_sequence_at_temperature_one_does_not_depend_on_colder_ones(
    make_model: MakeModel, mode: str
) -> None:
    model = make_model(2).double()
    prompts = prompts_of([4, 8], 2)
    options: dict[str, Any] = {"max_new_tokens": 20, "num_candidates": 15, "seed": 3}
    mixed = model.generate(prompts, temperature=torch.tensor([1.0, 0.4]), **options)
    alone = model.generate(prompts[:1], temperature=1.0, **options)
    assert mixed.new_tokens(0) == alone.new_tokens(0)
    assert mixed.mean_draws.tolist() == [1.0, 15.0]


def test_ended_sequences_leave_the_batch(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    patches = Drawer.patches

    def counted(drawer: Drawer, hidden: Any, noise: Any) -> Any:
        sizes.append(len(hidden))
        return patches(drawer, hidden, noise)

    monkeypatch.setattr(Drawer, "patches", counted)
    model = make_model(4, eos_token_id=[3, 8]).double()
    output = model.generate(prompts_of([8] * 6, 0), max_new_tokens=60, seed=1)
    assert output.finished.any()
    assert sizes[0] == 6 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 6


def test_backbone_that_is_not_plain_llama_still_generates(make_model: MakeModel) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = make_model(4, rope_parameters=rope)
    assert "depends on the length" in (why_not_static(dynamic) or "")
    assert dynamic.generate(prompts_of([6, 8], 1), max_new_tokens=9, seed=1).lengths.max() == 17

    class Layer(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = make_model(4).double()
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.5, "num_candidates": 9}
    expected = model.generate(prompts_of([8], 1), seed=1, **options)
    model.transformer.layers[0] = Layer(model.transformer.layers[0])
    assert "LlamaDecoderLayer" in (why_not_static(model) or "")
    assert_same(model.generate(prompts_of([8], 1), seed=1, **options), expected)
