"""Runs every benchmark beside this file, one after the other, each in a process of its own.

python tests/bench/run.py [NAME ...]        NAME: codec, engine, ingest ... ; all when left out
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    wanted = sys.argv[1:]
    programs = {p.stem.removeprefix("bench_"): p for p in sorted(HERE.glob("bench_*.py"))}
    unknown = [name for name in wanted if name not in programs]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(programs)}", file=sys.stderr)
        return 2
    failed = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    for name in wanted or programs:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, str(programs[name])], env=environment, check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all done")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
