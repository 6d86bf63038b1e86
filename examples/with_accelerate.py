"""Fine-tuning on several processes with Hugging Face accelerate, on the CPU or, with its launcher, on GPUs:

    torchrun --nproc-per-node 2 examples/with_accelerate.py
    accelerate launch --multi_gpu --mixed_precision bf16 examples/with_accelerate.py

Create the Accelerator first, so that the processes share the factorisation, and inject before prepare.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ssvd_kernels as sk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", default="adapter.safetensors")
    options = parser.parse_args()

    # without a GPU, accelerate must be told that the two processes belong together
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    set_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(accelerator.device)
    report = sk.inject(model, sk.SSVDConfig(ratio=0.4, targets=["linear1", "linear2"]))
    accelerator.print(report)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    data = DataLoader(TensorDataset(torch.randn(64, 16, 64)), batch_size=8)
    wrapped, optimizer, data = accelerator.prepare(model, optimizer, data)
    for epoch in range(options.epochs):
        losses = []
        for (x,) in data:
            with accelerator.accumulate(wrapped):
                loss = (wrapped(x) - x.flip(1)).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        mean = accelerator.gather(torch.stack(losses)).mean().item()
        accelerator.print(f"epoch {epoch}: loss {mean:.4f}")

    if accelerator.is_main_process:
        sk.save_adapter(accelerator.unwrap_model(wrapped), options.out)
    # delete the wrapper before the process group: otherwise DDP's destructor can wait for gloo's thread forever
    wrapped, optimizer = accelerator.free_memory(wrapped, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    main()
