"""CRC32, the one checksum of the format: ISA-L's, where it is installed, is five times as fast as zlib's, and equal."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
