"""``segbatch predict`` with a double as its model, as a process of its own: ``driver.py DOUBLE ARGUMENTS INPUT OUT``.

DOUBLE is the name of a class in ``doubles``, ARGUMENTS its arguments as JSON. Prints the result as JSON.
"""

import json
import logging
import sys
from dataclasses import asdict

import doubles

from segbatch import api
from segbatch.config import RunOptions
from segbatch.errors import SegbatchError


class Loud:
    """A watch that says everything on stderr."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin(self, what: str, total: int, unit: str = "images") -> None:
        self.say(f"begin {total}")

    def advance(self, done: int, bad: int) -> None:
        self.say(f"done {done}")

    def end(self) -> None:
        pass


def main() -> None:
    double, arguments, source, out, options = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    model = getattr(doubles, double)(**json.loads(arguments))
    try:
        result = api.predict(model, source, out, options=RunOptions(**json.loads(options)), watch=Loud())
    except SegbatchError as error:
        print(f"segbatch: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(json.dumps({**asdict(result.state), "rows_now": result.rows}))


if __name__ == "__main__":
    main()
