"""vLLM with our plugin against vLLM with the plain base, on the same prompts, in one process.

    venv-vllm/bin/python -m benchmarks.vllm_throughput photos

Prompts are texts: the base has no images to read. Both sides run without compilation, which takes
minutes at each start; rounds alternate. Results are ratios of throughput (plugin over base).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {  # read when vLLM is imported
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the time of this process is then all of it
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
import vllm
from vllm import LLM, SamplingParams, TokensPrompt

from benchmarks.measuring import add_options, interleaved, report
from llama_adapter.checkpoints.vllm_export import export_vllm
from llama_adapter.cli.models import adapter_directory
from llama_adapter.model.configuration import LlamaAdapterConfig
from llama_adapter.model.references import resolve_reference

REQUESTS, PROMPT, NEW = 16, 64, 48
"""Requests at once, and tokens of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="toy", help="an adapter, or toy or photos")
    add_options(parser, rounds=20)
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    directory = adapter_directory(options.model)
    base = LlamaAdapterConfig.from_pretrained(str(directory)).base["name_or_path"]
    with TemporaryDirectory() as folder:
        written = export_vllm(directory, out=Path(folder) / "export")
        paths = {"base": str(resolve_reference(base, directory=directory)), "plugin": written.out}
        sides = {name: _generate(str(path), options.dtype) for name, path in paths.items()}
        torch.set_num_threads(options.threads)
        result = interleaved(sides, over="plugin", rounds=options.rounds)
    result |= {"target": 0.9, "met": result["ratio_of_cpu_time"] >= 0.9}
    workload = {"requests": REQUESTS, "prompt_tokens": PROMPT, "new_tokens": NEW}
    vars(options).update(workload, vllm=vllm.__version__)
    del options.hidden, options.layers  # of random models
    name = f"{options.model}: {written.mode}"
    report("vllm-throughput", {name: result}, targets={}, options=options)


def _generate(path: str, dtype: str) -> Callable[[], None]:
    """A batch of greedy answers of fixed length; no prefix is known from an earlier round."""
    engine = LLM(path, dtype=dtype, max_model_len=256, max_num_seqs=REQUESTS, enforce_eager=True,
                 enable_prefix_caching=False, block_size=32)  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    drawn = torch.randint(20, 500, (REQUESTS, PROMPT), generator=torch.Generator().manual_seed(0))
    prompts = [TokensPrompt(prompt_token_ids=row) for row in drawn.tolist()]

    def generate() -> None:
        answers = engine.generate(prompts, sampling, use_tqdm=False)
        assert all(len(answer.outputs[0].token_ids) == NEW for answer in answers)

    return generate


if __name__ == "__main__":
    main()
