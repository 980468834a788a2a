"""The instructions of a compiled kernel's innermost loops, by ``nvdisasm``, which comes with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'nvdisasm'


def loop_instructions(cubin: bytes) -> list[Counter[str]]:
    """Count the instructions of one turn of each innermost loop, by name."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([NVDISASM, '-c', file.name], capture_output=True, text=True, check=True).stdout
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r'(\.L_\S+):', line.strip()):
            labels[label[1]] = len(names)
        elif instruction := re.search(r'/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z0-9]+)(.*);', line):
            names.append(instruction[1])
            target = re.search(r'`\((\.L_\S+)\)', instruction[2])
            # A branch to an earlier label closes a loop.
            if instruction[1] == 'BRA' and target and target[1] in labels:
                loops.append((labels[target[1]], len(names)))
    return [
        Counter(names[start:end])
        for start, end in loops
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
    ]
