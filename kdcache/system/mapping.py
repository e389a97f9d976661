"""Files mapped into memory, without a descriptor that stays open for each.

`mmap.mmap` and `np.memmap` keep one until the mapping ends, so an archive of 1,300 shards would need 1,300 of them, and
many systems allow 1,024. (From Python 3.13 on `mmap.mmap(trackfd=False)` does what this module does.)
"""

import ctypes
import mmap
import os
import weakref
from functools import lru_cache
from io import BufferedReader
from typing import Any

__all__ = ["map_readonly"]

FAILED = ctypes.c_void_p(-1).value


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def map_readonly(file: BufferedReader, size: int) -> memoryview:
    """The first `size` bytes, at least one, of an open file, which may be closed then. Raises OSError.

    They stay mapped as long as anything refers to them.
    """
    libc = _libc()
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), file.name)
    mapped = (ctypes.c_ubyte * size).from_address(address)
    # When the interpreter ends, threads may still read; the mapping ends with the process then.
    weakref.finalize(mapped, libc.munmap, address, size).atexit = False
    return memoryview(mapped).toreadonly().cast("B")
