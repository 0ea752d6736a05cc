"""Two processes, by DDP and FSDP2, train and score as one does on the same global batch."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, run
from safetensors.torch import load_file

HERE = Path(__file__).parent
TIMEOUT = 240
STEPS = 5
CUT = 3
"""Where runs are interrupted, one step after a checkpoint."""
BATCH = 4
"""Blocks a step, of all processes together."""
ROUNDING = 2e-6
"""Largest difference of a weight: what one run sums at once another sums in two parts, in float32.
Measured 2e-7, with weights up to 3 and 5 steps of AdamW at 3e-3."""
MUON_ROUNDING = 1e-3
"""Muon iterates in bfloat16, which rounds to 2^-9. Measured 3e-4; AdamW's weights are 4e-3 away."""

EPOCH = 4
"""Steps of an epoch of the baseline: its 18 blocks fill four, and two are left over."""

KINDS = ("autoencoder", "baseline", "energy")
WAYS = ("ddp", "fsdp")


@dataclass(frozen=True)
class Runs:
    """Where everything was trained, and what torchrun said."""

    root: Path
    said: str

    def folder(self, name: str, kind: str) -> Path:
        return self.root / name / kind

    def records(self, name: str, kind: str, processes: int = 2) -> list[dict[str, Any]]:
        paths = [self.root / f"{name}-{kind}.{rank}.json" for rank in range(processes)]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def command(
    root: Path,
    name: str,
    kind: str,
    *more: str,
    processes: int = 1,
    accumulation: int = 1,
    interrupt_at: int | None = None,
) -> Command:
    """Train ``root/name/kind`` on the global batch of these tests."""
    options = {
        "--output": root / name, "--corpus": root / "corpus", "--steps": STEPS,
        "--save-every": CUT - 1, "--evaluate-every": CUT, "--warmup-steps": 1,
        "--batch-size": BATCH // processes // accumulation, "--accumulation": accumulation,
    }  # fmt: skip
    if kind == "energy":
        options["--autoencoder"] = root / "one"
    else:
        options["--preset"] = "tiny"
    if kind == "baseline":
        options["--block-length"] = 1100
    given = [str(word) for option in options.items() for word in option]
    arguments = ["train", kind, *given, "--cpu", *more]
    return Command(arguments, str(root / f"{name}-{kind}"), interrupt_at)


def on_one(root: Path) -> list[Command]:
    """What one process trains."""
    return [
        *(command(root, "one", kind) for kind in KINDS),
        command(root, "muon", "energy", "--preset", "muon"),
        command(root, "cut", "energy", interrupt_at=CUT),
        command(root, "cut-muon", "energy", "--preset", "muon", interrupt_at=CUT),
    ]


def on_two(root: Path) -> list[Command]:
    """What two processes train."""
    two = {"processes": 2}
    return [
        *(command(root, "ddp", kind, **two) for kind in KINDS),
        *(
            command(root, "fsdp", kind, "--fsdp", accumulation=1 + (kind == "energy"), **two)
            for kind in KINDS
        ),
        command(root, "fsdp-muon", "energy", "--preset", "muon", "--fsdp", **two),
        command(root, "from-one-to-ddp", "energy", "--resume", **two),
        command(root, "from-one-to-fsdp", "energy", "--resume", "--fsdp", **two),
        command(
            root, "muon-from-one-to-fsdp", "energy", "--resume", "--fsdp", "--preset", "muon", **two
        ),
        command(root, "from-ddp-to-one", "energy", interrupt_at=CUT, **two),
        command(root, "from-fsdp-to-one", "energy", "--fsdp", interrupt_at=CUT, **two),
        command(root, "unfit", "energy", "--resume"),
        Command(evaluation(root), str(root / "evaluated-two")),
    ]


def evaluation(root: Path) -> list[str]:
    return ["evaluate", str(root / "one"), "--blocks", "50", "--cpu", "--json"]


def torchrun(commands: list[Command], root: Path) -> str:
    """Run commands in two processes; what they printed."""
    jobs = root / "jobs.json"
    jobs.write_text(json.dumps([asdict(each) for each in commands]), encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
            # A port that the rendezvous binds itself: one picked here may be taken until then.
            "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "--local_addr", "127.0.0.1",
            HERE / "commands.py", jobs,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus_writer: Callable[[Path], Path]) -> Runs:
    """Everything that these tests look at, trained once for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    root.mkdir(exist_ok=True)
    with open(root / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = root / "said"
        if not said.exists():
            corpus_writer(root / "corpus")
            said.write_text(train_all(root), encoding="utf-8")
        return Runs(root, said.read_text(encoding="utf-8"))


def train_all(root: Path) -> str:
    torch.set_num_threads(1)
    codes = [run(each) for each in on_one(root)]
    assert codes == [0, 0, 0, 0, 130, 130]
    for name in ("from-one-to-ddp", "from-one-to-fsdp", "unfit"):
        shutil.copytree(root / "cut", root / name)
    shutil.copytree(root / "cut-muon", root / "muon-from-one-to-fsdp")
    said = torchrun(on_two(root), root)
    for way in WAYS:
        assert run(command(root, f"from-{way}-to-one", "energy", "--resume")) == 0
    return said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_but_for_rounding(folder: Path, expected: Path, tolerance: float) -> None:
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        difference = (found[name] - value).abs().max().item()
        assert difference <= tolerance, f"{name}: {difference}"
    assert (folder / "config.json").read_text() == (expected / "config.json").read_text()


def history(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_the_weights_that_one_does(runs: Runs, way: str, kind: str) -> None:
    assert [record["code"] for record in runs.records(way, kind)] == [0, 0]
    assert_equal_but_for_rounding(runs.folder(way, kind), runs.folder("one", kind), ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_one_process_alone_makes_and_removes_folders(runs: Runs, way: str, kind: str) -> None:
    """Another that made them at the same time could find one removed and give up."""
    first, second = (record["folders"] for record in runs.records(way, kind))
    assert first > 0
    assert second == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_logged_is_the_mean_over_processes(runs: Runs, way: str, kind: str) -> None:
    expected, found = (history(runs.folder(name, kind)) for name in ("one", way))
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    assert any("loss" in entry for entry in found)
    assert any("eval_token_accuracy" in entry or "eval_brier_1" in entry for entry in found)
    for entry, wanted in zip(found, expected, strict=True):
        for name in wanted.keys() - {"seconds"}:
            assert entry[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("name", ["fsdp-muon", "muon-from-one-to-fsdp"])
def test_sharded_matrices_are_trained_by_muon_as_whole_ones_are(runs: Runs, name: str) -> None:
    folder = runs.folder(name, "energy")
    assert_equal_but_for_rounding(folder, runs.folder("muon", "energy"), MUON_ROUNDING)
    hidden = "mlp_generator.hidden_embd.weight"
    by_adamw = weights(runs.folder("one", "energy"))[hidden]
    assert (weights(folder)[hidden] - by_adamw).abs().max() > 3 * MUON_ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_leaves_half_of_the_trained_weights_to_each_process(runs: Runs, kind: str) -> None:
    shards = [record["shard"] for record in runs.records("fsdp", kind)]
    assert sum(shard["here"] for shard in shards) == shards[0]["whole"]
    for shard in shards:
        assert shard["here"] == pytest.approx(shard["whole"] / 2, rel=0.01)
    for record in runs.records("ddp", kind):
        assert record["shard"]["here"] == record["shard"]["whole"] == shards[0]["whole"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_processes_share_the_blocks_of_every_step_and_none_sees_anothers(
    runs: Runs, way: str, kind: str
) -> None:
    (alone,) = runs.records("one", kind, processes=1)
    shared = runs.records(way, kind)
    for step in range(STEPS):
        whole = [b for part in alone["batches"] if part["step"] == step for b in part["blocks"]]
        parts = [[part for part in record["batches"] if part["step"] == step] for record in shared]
        in_turn = [part["blocks"] for turn in zip(*parts, strict=True) for part in turn]
        assert [block for blocks in in_turn for block in blocks] == whole
        assert len(set(whole)) == len(whole) == BATCH


def test_every_epoch_shuffles_anew_and_leaves_other_blocks_over(runs: Runs) -> None:
    (alone,) = runs.records("one", "baseline", processes=1)
    steps = [part["blocks"] for part in alone["batches"]]
    assert len({block for step in steps[:EPOCH] for block in step}) == EPOCH * BATCH
    assert steps[EPOCH] not in steps[:EPOCH]


@pytest.mark.parametrize("kind", ["autoencoder", "energy"])
@pytest.mark.parametrize("way", WAYS)
def test_every_process_has_its_own_rows_of_the_noise_of_a_step(
    runs: Runs, way: str, kind: str
) -> None:
    for step in range(STEPS):
        seeds, firsts = [], []
        for record in runs.records(way, kind):
            for part in record["batches"]:
                if part["step"] == step:
                    seeds.append(part["noise"][0])
                    firsts.append(part["noise"][1])
        assert len(set(seeds)) == 1
        assert sorted(firsts) == list(range(0, BATCH, BATCH // len(firsts)))
    (alone,) = runs.records("one", kind, processes=1)
    assert len({part["noise"][0] for part in alone["batches"]}) == STEPS


@pytest.mark.parametrize(
    "name", ["from-one-to-ddp", "from-one-to-fsdp", "from-ddp-to-one", "from-fsdp-to-one"]
)
def test_checkpoints_resume_on_another_number_of_processes(runs: Runs, name: str) -> None:
    processes = 1 if name.endswith("one") else 2
    for record in runs.records(name, "energy", processes):
        assert record["code"] == 0
        assert {part["step"] for part in record["batches"]} == set(range(CUT - 1, STEPS))
    assert_equal_but_for_rounding(
        runs.folder(name, "energy"), runs.folder("one", "energy"), ROUNDING
    )


def test_resuming_with_another_global_batch_is_refused_with_the_sizes_that_fit(runs: Runs) -> None:
    assert [record["code"] for record in runs.records("unfit", "energy")] == [2, 2]
    assert "global batch size 4 -> 8" in runs.said
    assert "4 blocks a step are --batch-size 2 --accumulation 1 with 2 processes" in runs.said
    assert (runs.folder("unfit", "energy") / "checkpoints" / f"checkpoint-{CUT - 1}").is_dir()


def test_a_sharded_evaluation_gives_what_one_process_gives(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(Command(evaluation(runs.root), str(runs.root / "evaluated-one"))) == 0
    alone = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in alone] == ["autoencoder", "energy", "baseline"]
    start = runs.said.rindex("[\n  {\n")
    shared, _ = json.JSONDecoder().raw_decode(runs.said[start:])
    for row, wanted in zip(shared, alone, strict=True):
        assert row.keys() == wanted.keys()
        for name in row.keys() - {"run", "model"}:
            if wanted[name] is None:
                assert row[name] is None, name
            else:
                assert row[name] == pytest.approx(wanted[name], rel=1e-12, abs=0), name


def test_fsdp_with_one_process_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(tmp_path, "alone", "baseline", "--fsdp")) == 2
    assert "torchrun --nproc_per_node N" in capsys.readouterr().err
    assert not (tmp_path / "alone").exists()


def test_a_killed_language_model_resumes_to_the_same_weights_bit_for_bit(
    runs: Runs, tmp_path: Path
) -> None:
    many = ("--steps", "40", "--save-every", "4")
    killed = command(runs.root, "killed", "energy", *many)
    process = subprocess.Popen(
        [sys.executable, "-m", "calm_kernels", *killed.arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    folder, whole = runs.folder("killed", "energy"), runs.folder("unkilled", "energy")
    deadline = time.monotonic() + TIMEOUT
    # The second one begins: whatever the kill leaves of it, the first one is whole.
    while not (folder / "checkpoints" / "checkpoint-8").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists()

    resumed = command(runs.root, "killed", "energy", *many, "--resume")
    assert run(resumed) == 0
    (record,) = runs.records("killed", "energy", processes=1)
    assert 0 < record["batches"][0]["step"] < 40
    assert run(command(runs.root, "unkilled", "energy", *many)) == 0
    found, wanted = weights(folder), weights(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    entries = [
        [{k: v for k, v in entry.items() if k != "seconds"} for entry in history(each)]
        for each in (folder, whole)
    ]
    assert entries[0] == entries[1]
