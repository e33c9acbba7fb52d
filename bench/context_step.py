"""One system in a process of its own: the memory that its decode state takes, beside what accounting says."""

import json
import sys

import torch

from bench.context import SYSTEMS, reading

CHUNK = 128


def resident() -> int:
    """Bytes of memory that this process has now."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Prints what a state of that many rows and tokens takes: {"measured", "accounted"} in bytes."""
    name, batch, context, layers, width = json.loads(sys.argv[1])
    torch.manual_seed(0)
    model = SYSTEMS[name](layers, width)
    tokens = torch.randint(model.vocabulary, (batch, context))
    reading(model, tokens[:, : 2 * CHUNK], 2 * CHUNK, CHUNK)  # what a first pass allocates for good is not the state's
    before = resident()
    state = reading(model, tokens, context, CHUNK)
    print(json.dumps({"measured": resident() - before, "accounted": state.nbytes}))


if __name__ == "__main__":
    main()
