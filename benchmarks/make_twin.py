"""A twin of the bundled model that says the same, token for token, but reads as much memory per step as a 1B model.

    python benchmarks/make_twin.py /tmp/twin
    vllm-lookahead bench run --model /tmp/twin --dtype float32 --eager --temperature 0,0.8 --batch 1,4 ...

People decode where a step waits for the weights; the bundled model's 28 MB stay in a CPU's cache. In the twin every
feed-forward layer is as wide as ``--gigabytes`` asks for: its neurons come again and again, and the down projection is
zero for the copies. Zeros leave a sum as it is, so as long as a kernel adds up the real neurons in the same order the
logits are the same bits. They are with vLLM's float32 kernel and AVX2; the tokens are checked by
``tests/engine/test_twin.py``.

The default, 2 GB, is what a model of 1B parameters has in 16 bits. It is meant for float32: a weight is then four bytes
to read for two operations per token, which is as memory-bound as a CPU gets.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

MODEL = Path(__file__).parents[1] / "vllm_lookahead" / "demo" / "model"


def make_twin(model: Path, folder: Path, gigabytes: float) -> int:
    """Write the twin of a Llama with tied embeddings.

    Returns:
        How many bytes a step reads in float32: all weights (the embeddings are read whole for the logits).
    """
    weights = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    total = sum(weight.numel() for weight in weights.values())
    wide = sum(weight.numel() for name, weight in weights.items() if ".mlp." in name)
    copies = max(1, round((gigabytes * 1e9 / 4 - (total - wide)) / wide))
    config["intermediate_size"] *= copies
    for name, weight in weights.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            weights[name] = weight.repeat(copies, 1)
        elif name.endswith("down_proj.weight"):
            weights[name] = pad(weight, (0, config["intermediate_size"] - weight.shape[1]))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return 4 * (total - wide + copies * wide)


def main() -> None:
    """Parse the command line and write the twin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="what a step reads, in float32")
    options = parser.parse_args()
    size = make_twin(MODEL, options.folder, options.gigabytes)
    print(f"{options.folder}: a step reads {size:,} bytes in float32, {size // 2:,} in 16 bits")


if __name__ == "__main__":
    main()
