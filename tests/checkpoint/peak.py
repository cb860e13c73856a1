"""Runs launch/convert.py and writes how far its anonymous memory rose above what the imports left, in bytes.

python tests/checkpoint/peak.py RESULT.json SRC DST ...

Anonymous pages alone: files that the kernel keeps mapped or cached are not the program's. They are polled every
millisecond; what hashes, reads and multiplies lets other threads run meanwhile.
"""

import gc
import json
import re
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0:0] = [str(ROOT), str(ROOT / "launch")]


def anonymous() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


class Peak(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.stopped = 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.001):
            self.highest = max(self.highest, anonymous())


def main() -> int:
    import convert

    import abba.base_model
    import abba.checkpoint.convert
    import abba.checkpoint.source
    import abba.evaluation.parity  # noqa: F401

    result = Path(sys.argv.pop(1))
    gc.collect()
    baseline, peak, started = anonymous(), Peak(), time.monotonic()
    peak.start()
    code = convert.main()
    peak.stopped.set()
    peak.join()
    result.write_text(json.dumps({"peak": peak.highest - baseline, "seconds": time.monotonic() - started}))
    return code


if __name__ == "__main__":
    sys.exit(main())
