"""Checkpoints to save and to damage."""

import json

import torch

from rlhf_fn import checkpoint
from rlhf_fn.manifest import _canonical, _digest


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 2), float(step)), "step": torch.tensor(step)}


def saved(folder, *steps: int, **options) -> None:
    for step in steps:
        checkpoint.save(folder, step, tensors(step), {"at": step}, **options)


def steps_in(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def rewrite(path, change) -> None:
    """Change a manifest and sign it again, as an attacker would."""
    file = path / "MANIFEST.json"
    manifest = json.loads(file.read_text())["manifest"]
    change(manifest)
    signed = {"sha256": _digest(_canonical(manifest)), "manifest": manifest}
    file.write_text(json.dumps(signed))


def replace(path, file, header: bytes, body: bytes, length: int | None = None):
    size = len(header) if length is None else length
    sign(path, file, size.to_bytes(8, "little") + header + body)


def sign(path, file, content: bytes):
    file.write_bytes(content)
    listed = {"bytes": len(content), "sha256": _digest(content)}
    rewrite(path, lambda m: m["files"].update({file.name: listed}))


def flip(path):
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
