"""Look at processes by /proc: those below another one, and where they listen."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

LISTEN = "0A"  # the state in /proc/net/tcp


def descendants(pid: int) -> dict[int, str]:
    """Return the processes below this one, each with its command line."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            status = (folder / "stat").read_text("utf-8", "replace")
            parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])  # the name in (...) may be anything
    found: dict[int, str] = {}
    fresh = {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh}
        for child in fresh:
            with suppress(OSError):
                line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ")
                found[child] = line.decode("utf-8", "replace")
    return found


def listening_addresses(pids: Iterable[int]) -> set[str]:
    """Return the addresses at which these processes accept TCP connections."""
    own = set()
    for pid in pids:
        with suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    own.update(re.findall(r"socket:\[(\d+)\]", str(link.readlink())))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTEN and words[9] in own:
                    found.add(address_of(words[1].partition(":")[0]))
    return found


def address_of(digits: str) -> str:
    """Return the address that the kernel shows as hexadecimal words, each in the machine's own order of bytes."""
    words = [bytes.fromhex(digits[start : start + 8])[::-1] for start in range(0, len(digits), 8)]
    found = ipaddress.ip_address(b"".join(words))
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)
