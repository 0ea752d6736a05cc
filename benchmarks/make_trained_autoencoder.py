"""What the vocabulary head of a trained autoencoder sees: the input of workload ``ae-ce-trained``.

    calm-kernels train autoencoder --preset small --output runs/small
    python benchmarks/make_trained_autoencoder.py runs/small --output runs/small/head.pt
    CALM_KERNELS_TRAINED_HEAD=runs/small/head.pt calm-kernels bench ae-ce-trained

Takes the autoencoder and the data of a run folder, passes training batches through the model once
in training mode (tokens and latents dropped out, latents drawn) and once in evaluation mode, and
writes one file of tensors: ``weight`` [V, H] of the head, ``target`` [N], and the hidden states
``on`` and ``off`` [N, H] that belong to it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from calm_kernels.models import Autoencoder
from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.data import open_data


@torch.no_grad()
def hidden_states(model: Autoencoder, ids: Tensor, seed: int) -> Tensor:
    """What the head gets, [tokens, H], in the model's mode; seen at the loss."""
    seen: list[Tensor] = []
    handle = model.cross_entropy.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(ids, seed=seed)
    finally:
        handle.remove()
    return seen[0].flatten(0, -2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder with autoencoder/ and data/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16384, help="tokens to keep")
    parser.add_argument("--seed", type=int, default=0, help="of the dropouts and latents")
    arguments = parser.parse_args()

    model = Autoencoder.from_pretrained(arguments.run / "autoencoder")
    patch_size = model.config.patch_size
    blocks = PackedBlocks(open_data(arguments.run / "data").train, 32 * patch_size, patch_size)
    count = -(-arguments.rows // blocks.block_length)
    ids = torch.stack([blocks.block(index) for index in blocks.spread(count)])
    content = {
        "on": hidden_states(model.train(), ids, arguments.seed),
        "off": hidden_states(model.eval(), ids, arguments.seed),
        "target": ids.flatten(),
    }
    content = {name: value[: arguments.rows].clone() for name, value in content.items()}
    content["weight"] = model.decoder.lm_head_weight.detach().clone()
    torch.save(content, arguments.output)
    rows, hidden_size = content["on"].shape
    print(f"{arguments.output}: {rows} rows, H={hidden_size}, V={content['weight'].shape[0]}")


if __name__ == "__main__":
    main()
