"""Run as a program: what ``LLM.generate`` and ``LLM.chat`` of stock vLLM make of rows.

python generate.py MODEL ENGINE SAMPLING ROWS.jsonl OUTPUT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(model: str, engine: dict[str, Any], options: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By id: tokens and texts."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, **engine)
    sampling = SamplingParams(**options)
    texts = [row for row in rows if "prompt" in row]
    chats = [row for row in rows if "messages" in row]
    outputs = llm.generate([row["prompt"] for row in texts], sampling, use_tqdm=False)
    outputs += llm.chat([row["messages"] for row in chats], sampling, use_tqdm=False)
    return {
        row["id"]: {
            "generated_text": output.outputs[0].text,
            "generated_tokens": list(output.outputs[0].token_ids),
            "num_input_tokens": len(output.prompt_token_ids or ()),
            "num_generated_tokens": len(output.outputs[0].token_ids),
        }
        for row, output in zip([*texts, *chats], outputs, strict=True)
    }


if __name__ == "__main__":
    os.environ["VLLM_PLUGINS"] = ""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
    model_folder, engine_json, sampling_json, rows_file, output_file = sys.argv[1:]
    given = [json.loads(line) for line in Path(rows_file).read_bytes().splitlines()]
    found = main(model_folder, json.loads(engine_json), json.loads(sampling_json), given)
    Path(output_file).write_text(json.dumps(found))
