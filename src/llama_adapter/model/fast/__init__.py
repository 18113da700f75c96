"""Faster ways to compute what plain code computes, each behind one function.

A function has the signature of the plain code next to it and decides by itself which of the two
runs; `switched_off` turns all of them off. What each does, when, and its gain:

`scale_and_shift`       Bias and scale of a linear in one pass over its output; in training the
                        output alone is kept. Where both learn. Part of the whole: 0.86 of the time
                        and 0.62 of the memory of peft's LoRA (benchmarks/step.py, hidden 1024).
`attention`             PyTorch's kernel; on a CPU plain products in half types and where few keys
                        learn (up to 4 to 10 and 3 times as fast), and one product for a head's
                        tokens where rows share their keys.
`rms_norm`              A backward pass from the input alone. In training, for norms that compute
                        just that: 2.5 for 5.2 ms (512 tokens of width 1024, both passes).
`summed_cross_entropy`  Keeps its gradient, not log-probabilities. In training: two float32 copies
                        of the logits fewer at the peak.

Measured on a 2-core AMD EPYC in float32 unless stated, torch 2.13 (docs/speed.md); none of it on a
GPU. Under a compiler, which fuses what autograd derives, no custom backward pass runs.
"""
