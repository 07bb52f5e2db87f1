"""What training says: lines of the logger 'bnonly'.

They go to standard error, unless the program has set up logging itself; then they go where all its lines go.
`logging.getLogger("bnonly").setLevel("WARNING")` turns them off, and progress bars with them.
"""
import logging
import sys
from contextlib import contextmanager

__all__ = ["logger", "quiet"]


class StandardError(logging.StreamHandler):
    "Writes to what `sys.stderr` is by then; nothing where the program has handlers of its own."
    def emit(self, record):
        if logging.getLogger().handlers: return
        self.stream = sys.stderr
        super().emit(record)


logger = logging.getLogger("bnonly")
if not logger.handlers: logger.addHandler(StandardError())
if logger.level == logging.NOTSET: logger.setLevel(logging.INFO)


@contextmanager
def quiet():
    "Say nothing but warnings within."
    before = logger.level
    logger.setLevel(max(before, logging.WARNING))
    try: yield
    finally: logger.setLevel(before)
