"""llama.cpp's side, in a process of its own: tokens, logits and answers of a GGUF file as JSON.

Usage: answer.py MODEL.gguf, with {"texts": [...], "tokens": [...], "questions": [...]} on stdin.
"""

from __future__ import annotations

import json
import sys

from llama_cpp import GGML_TYPE_F32, Llama

asked = json.load(sys.stdin)
llama = Llama(
    sys.argv[1],
    n_ctx=256,
    logits_all=True,
    type_k=GGML_TYPE_F32,  # by default the cache is in float16
    type_v=GGML_TYPE_F32,
    n_threads=1,
    verbose=False,
)
found = {"tokens": [llama.tokenize(t.encode(), special=True) for t in asked["texts"]]}
llama.eval(asked["tokens"])
found["logits"] = llama.scores[: len(asked["tokens"])].tolist()
llama.reset()
found["answers"] = [
    llama.create_chat_completion(
        [{"role": "user", "content": question}], temperature=0, max_tokens=12, stop=asked["stop"]
    )["choices"][0]["message"]["content"]
    for question in asked["questions"]
]
json.dump(found, sys.stdout)
