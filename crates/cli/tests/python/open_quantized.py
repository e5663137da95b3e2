"""Opens checkpoints, INT8 or not, with transformers, and compares every weight.

    open_quantized.py CHECKPOINT [CHECKPOINT ...]

Each must load without a missing or unexpected key, and every parameter of the
model must be the one that the files give: of a quantised matrix, integer times
scale. Scales are read here without any library.
"""

import json
import struct
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8}


def tensors(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        data = path.read_bytes()
        (n,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + n]).items():
            if name != "__metadata__":
                start, end = (8 + n + offset for offset in entry["data_offsets"])
                content = bytearray(data[start:end])
                tensor = torch.frombuffer(content, dtype=DTYPES[entry["dtype"]])
                found[name] = tensor.reshape(entry["shape"])
    return found


def check(folder):
    # In f32: the loader casts scales to the type of the model.
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(kind), f"{folder}: {kind}: {info[kind]}"
    stored = tensors(folder)
    n_integers = 0
    # A run decompresses what is decompressed lazily.
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3, 4]])).logits
    assert torch.isfinite(logits).all()
    loaded = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, tensor in stored.items():
        if name.endswith("_scale"):
            continue
        expected = tensor.to(torch.float32)
        if tensor.dtype == torch.int8:
            n_integers += 1
            expected = expected * stored[name + "_scale"]
        weight = loaded[name].detach()
        if weight.dtype == torch.int8:
            weight = weight.to(torch.float32) * loaded[name + "_scale"].detach()
        assert torch.equal(weight.to(torch.float32), expected), f"{folder}: {name} differs"
    config = json.loads((Path(folder) / "config.json").read_text())
    assert (n_integers > 0) == ("quantization_config" in config), f"{folder}: {n_integers}"
    print(f"{folder}: {len(stored)} tensors, {n_integers} of integers, as stored")


for argument in sys.argv[1:]:
    check(argument)
