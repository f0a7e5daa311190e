"""GPUs as the emitter sees them: what decides how an operand is loaded and which tile is a good default."""

import functools
from dataclasses import dataclass

import torch

from ...ir.errors import TargetError


@dataclass(frozen=True)
class Target:
    """`copies_blocks`: hardware copies blocks of tensors to shared memory by a descriptor (Hopper's tensor memory accelerator).
    `shared_bytes` is what a program may have, `lanes` how many threads a warp has."""

    name: str
    multiprocessors: int
    copies_blocks: bool
    shared_bytes: int
    lanes: int = 32

    @property
    def has_tensor_memory(self) -> bool:
        """Whether sums lie in a memory of their own, and a thread has 128 registers (Blackwell)."""
        return self.copies_blocks and self.name.removeprefix("sm_").isdigit() and int(self.name.removeprefix("sm_")) >= 100


TARGETS = {
    "sm_80": Target("sm_80", 108, False, 163 * 1024),
    "sm_90": Target("sm_90", 132, True, 227 * 1024),
    "sm_100": Target("sm_100", 148, True, 227 * 1024),
    "gfx942": Target("gfx942", 304, False, 64 * 1024, lanes=64),
}
DEFAULT = TARGETS["sm_90"]


def named(name: str) -> Target:
    """Raises TargetError for a name that is not in `TARGETS`."""
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}: it is one of {', '.join(TARGETS)}")
    return TARGETS[name]


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target that a device is like; for a CPU, whose kernels are interpreted, the default."""
    if device.type != "cuda":
        return DEFAULT
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        like = TARGETS["gfx942"]
        return Target(found.gcnArchName.partition(":")[0], found.multi_processor_count, False, like.shared_bytes, like.lanes)
    like = TARGETS["sm_100" if found.major >= 10 else "sm_90" if found.major == 9 else "sm_80"]
    # Beside the flagships of a generation there are GPUs with less shared memory, sm_86 and sm_120 among them.
    shared = min(like.shared_bytes, getattr(found, "shared_memory_per_block_optin", like.shared_bytes))
    return Target(f"sm_{found.major}{found.minor}", found.multi_processor_count, like.copies_blocks, shared)
