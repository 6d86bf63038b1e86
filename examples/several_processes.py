"""Fine-tuning on several processes with DDP or FSDP2. Needs only torch and this package, no GPU:

    torchrun --nproc-per-node 2 examples/several_processes.py            # DDP
    torchrun --nproc-per-node 2 examples/several_processes.py --fsdp

The order matters: inject (the processes share the factorisation), then wrap the model, then create the optimizer.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ssvd_kernels as sk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="shard the model with FSDP2, not replicate it with DDP")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--out", default="adapter.safetensors")
    options = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(options)  # a separate function, so that the DDP wrapper is deleted before the process group: otherwise its
    dist.destroy_process_group()  # destructor can hold the GIL while it waits for gloo's thread, which needs the GIL


def train(options: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # every process starts from the same base model, as from one checkpoint
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device)
    report = sk.inject(model, sk.SSVDConfig(ratio=0.4, targets=["linear1", "linear2"]))
    if rank == 0:
        print(report)
    if options.fsdp:
        for block in model.layers:
            fully_shard(block)
        wrapped = fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model, device_ids=[device] if cuda else None)

    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    for step in range(options.steps):
        total = torch.zeros((), device=device)
        for micro in range(options.accumulate):
            last = micro == options.accumulate - 1  # gradients are exchanged once a step
            if options.fsdp:
                wrapped.set_requires_gradient_sync(last)
            with nullcontext() if options.fsdp or last else wrapped.no_sync():
                generator = torch.Generator().manual_seed(ranks * micro + rank)  # each process has its part of the data
                x = torch.randn(8, 16, 64, generator=generator).to(device)
                loss = (wrapped(x) - x.flip(1)).square().mean() / options.accumulate
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step}: loss {total.item() / ranks:.4f}")

    if options.fsdp or rank == 0:  # FSDP2's shards are gathered, so every process must call
        sk.save_adapter(wrapped, options.out)


if __name__ == "__main__":
    main()
