#!/usr/bin/env python
"""Draw one or several runs on one HTML page that opens without a network: curves, scores, generations, recipes.

    python launch/report.py runs/quickstart
    python launch/report.py runs/sweep-1e-3 runs/sweep-2e-3 --output comparison.html --samples 20

Without --output it is report.html in the directory of the first run that it shows; a page that stands there is
replaced. Scores are found where launch/evaluate.py was told to write them in a directory of the run. Of several
runs those without a step are left out, with a line that says so.
"""

import sys
from pathlib import Path

from common import argument_parser, local_path, positive, run_program

from abba.errors import CheckpointError


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN", help="output_dir of a run, alive or done")
    parser.add_argument("--output", type=local_path, metavar="HTML", help="default report.html in the first RUN")
    parser.add_argument("--samples", type=positive, default=8, help="generations of each score; default 8")
    arguments = parser.parse_args()
    return run_program(lambda: print(write_report(arguments.runs, arguments.output, arguments.samples)))


def write_report(paths: list[Path], output: Path | None, samples: int) -> Path:
    from abba.prepared import replacing
    from abba.report.page import page
    from abba.report.run import NothingYetError, read_run

    if output is not None and not output.name:  # . and /
        raise CheckpointError(f"{output}: cannot be written: Is a directory; choose another --output")
    paths, runs = list(dict.fromkeys(paths)), []
    for path in paths:
        try:
            runs.append(read_run(path, samples))
        except NothingYetError as error:
            if path == paths[-1] and not runs:
                raise
            print(f"warning: left out: {error.reason}", file=sys.stderr)
    for run in runs:
        for warning in run.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    output, drawn = output or Path(runs[0].name) / "report.html", page(runs)
    try:
        with replacing(output) as temporary:
            temporary.write_text(drawn, encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{output}: cannot be written: {reason}; choose another --output") from error
    return output


if __name__ == "__main__":
    sys.exit(main())
