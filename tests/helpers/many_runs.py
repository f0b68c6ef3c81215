"""Started by `deepspeed`: train each argument list of a JSON file in turn, in these processes."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from ecdit_ds.train import main

if __name__ == "__main__":
    plan = Path(next(argument for argument in sys.argv[1:] if argument.endswith(".json")))
    for arguments in json.loads(plan.read_text()):
        code = main(arguments)
        if code:
            sys.exit(code)
