"""Telling systemd how the service does: sd_notify(3), without its library."""

import os
import socket


def notify(*lines: str) -> None:
    """Send lines such as `READY=1` to who started us as a service of type notify; nothing happens elsewhere."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            sender.send("\n".join(lines).encode())
        except OSError:  # systemd went away or is busy; the service itself is sound
            return
