"""A model larger than the memory that a conversion may have: imported and exported again, the same bits.

    python benchmarks/large_model.py [--layers 40] [--limit-gigabytes 1.5] [--directory DIR] [--json FILE]

Writes a Llama with random bf16 weights (the width of TinyLlama; 40 layers are 1.9 G parameters, 7.7 GB as our float32)
as Hugging Face's safetensors, then runs `bloomery checkpoint import` and `export` on it as a user does, each under a
limit of the operating system on private memory (RLIMIT_DATA), and compares every tensor of what comes out. Printed are
the time, and the highest private memory (RssAnon) over that of a call that only imports the same modules.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1]))

from parallel.common.files import write_json

REPOSITORY = Path(__file__).parents[1]
GIGABYTE = 1e9
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 10000.0,
}  # fmt: skip


def tensors(layers: int) -> Iterator[dict[str, torch.Tensor]]:
    """One file's at a time: a layer, then what is left."""
    generator = torch.Generator().manual_seed(1)
    width, inner, rows, keys = 2048, 5632, 32000, 256

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16)

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        yield {f"{prefix}{name}.weight": random(*shape) for name, shape in shapes.items()}
    yield {
        "model.embed_tokens.weight": random(rows, width),
        "lm_head.weight": random(rows, width),
        "model.norm.weight": random(width),
    }


def write_model(directory: Path, layers: int) -> int:
    """The bytes written."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    for number, content in enumerate(tensors(layers)):
        save_file(content, directory / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    return sum(file.stat().st_size for file in directory.iterdir())


def run(words: list[str], limit_bytes: int) -> tuple[float, int]:
    """Seconds and the highest private bytes of a command under a limit."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started, highest = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, *words], env=environment, preexec_fn=limited)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        highest = max(highest, int(found[0].split()[1]) * 1024 if found else 0)
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"{' '.join(words)} failed under a limit of {limit_bytes / GIGABYTE:.1f} GB")
    return time.monotonic() - started, highest


def differing(first: Path, second: Path) -> list[str]:
    """Names of tensors that are not the same on both sides."""
    places = {}
    for directory in (first, second):
        for file in directory.glob("*.safetensors"):
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 - it is no mapping
                    places.setdefault(name, []).append(file)
    wrong = []
    for name, files in places.items():
        found = []
        for file in files:
            with safe_open(file, framework="pt") as content:
                found.append(content.get_tensor(name))
        if len(found) != 2 or not torch.equal(*found):
            wrong.append(name)
    return wrong


def main() -> int:
    """Exit code 1 where a tensor differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--limit-gigabytes", type=float, default=1.5, help="private memory of each conversion")
    parser.add_argument("--directory", type=Path, help="where there is room for four times the bf16 model")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    limit = int(options.limit_gigabytes * GIGABYTE)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        theirs, ours, back = (Path(name) / part for part in ("theirs", "run", "back"))
        size = write_model(theirs, options.layers)
        print(f"a Llama of {size / 2 / GIGABYTE:.2f} G parameters: {size / GIGABYTE:.2f} GB in bf16", flush=True)
        modules = "import launcher.conversion.importing, launcher.conversion.export"
        _, idle = run(["-P", "-W", "ignore", "-c", modules], limit)
        bloomery = ["-P", "-W", "ignore", "-m", "launcher", "checkpoint"]
        figures = {"bytes": size, "limit_bytes": limit, "imports_bytes": idle}
        for word, words in (
            ("import", ["import", str(theirs), "--output", str(ours), "--no-check"]),
            ("export", ["export", str(ours), "--output", str(back), "--dtype", "bfloat16", "--no-check"]),
        ):  # fmt: skip
            seconds, highest = run([*bloomery, *words], limit)
            figures[word] = {"seconds": seconds, "private_bytes": highest}
            print(
                f"{word}: {seconds:.0f} s, at most {highest / GIGABYTE:.2f} GB private memory, "
                f"{(highest - idle) / GIGABYTE:.2f} GB over the {idle / GIGABYTE:.2f} of imports",
                flush=True,
            )
        wrong = differing(theirs, back)
    print(f"{len(wrong)} tensors differ after import and export" + (f": {wrong[0]} ..." if wrong else ""))
    if options.json:
        write_json(options.json, figures)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
