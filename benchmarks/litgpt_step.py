"""One training step of litgpt's adapter_v2, for `benchmarks.train step`; needs litgpt alone.

    python benchmarks/litgpt_step.py --device cpu --dtype float32 --hidden 1024 --layers 8 ...

Prints one line when it is ready, then answers each line of its input: `step` makes a step,
`memory` says how far memory grew at its peak.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from litgpt.adapter_v2 import GPT, Config, mark_only_adapter_v2_as_trainable
from torch.nn import functional as F


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    for name in ("hidden", "layers", "batch", "tokens", "threads"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = Config(
        block_size=max(512, options.tokens),
        padded_vocab_size=8000,
        n_layer=options.layers,
        n_embd=options.hidden,
        n_head=options.hidden // 64,
        intermediate_size=options.hidden * 11 // 4,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        adapter_prompt_length=10,
        adapter_start_layer=1,
    )
    model = GPT(config).to(options.device)
    mark_only_adapter_v2_as_trainable(model)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, options.dtype))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (options.batch, options.tokens), generator=generator)
    ids = ids.to(options.device)
    labels = ids.clone()
    labels[:, : options.tokens // 2] = -100
    half = options.dtype == "bfloat16"
    blocks = [block for block in model.transformer.h if hasattr(block.attn, "adapter_kv_cache")]
    before = reset_peak(options.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for block in blocks:
            # it keeps keys of prompts from the first pass, which a second backward cannot pass
            block.attn.adapter_kv_cache = None
        with torch.autocast(options.device, torch.bfloat16, enabled=half):
            logits = model(ids)
        targets = labels[:, 1:].flatten()
        F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets).backward()
        optimizer.step()
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()

    print(json.dumps({"trainable": sum(p.numel() for p in trainable)}), flush=True)
    for line in sys.stdin:
        if line.strip() == "step":
            step()
            print("{}", flush=True)
        else:
            print(json.dumps({"bytes": peak(options.device) - before}), flush=True)


def reset_peak(device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: str) -> int:
    return int(torch.cuda.max_memory_allocated()) if device.startswith("cuda") else status("VmHWM")


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main()
