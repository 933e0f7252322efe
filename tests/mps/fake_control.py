"""A scripted `nvidia-cuda-mps-control`: behaves as documented, or as FAKE_MPS says; no GPU needed.

The daemon (`-f`) listens on a socket in CUDA_MPS_PIPE_DIRECTORY, has one server (a sleeping child) from
`start_server` on, and tells as clients the pids in the file `clients` there. A server's status is ACTIVE, or what the
file `status` says. It notes each command in the file `commands` of CUDA_MPS_LOG_DIRECTORY. FAKE_MPS of the client:
hang, slow, garbage, refuse and wrong-user (status 1 with the driver's text). FAKE_MPS_DAEMON: fails (ends at once),
mute (accepts, never answers), stubborn (does not end on quit), slow (listens after half a second), forgets (the
defaults that were set).
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PIPE_DIR = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))


def client() -> int:
    behaviour = os.environ.get("FAKE_MPS", "")
    if behaviour == "hang":
        time.sleep(60)
    if behaviour == "slow":
        time.sleep(0.3)
    if behaviour == "wrong-user":  # the sockets of another user's daemon
        print("Insufficient permissions to connect to the MPS control daemon")
        return 1
    if behaviour == "garbage":
        print("Segmentation fault \x00 12 monkeys")
        return 0
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(PIPE_DIR / "control"))
    except OSError:
        behaviour = "refuse"
    if behaviour == "refuse":
        print("Cannot find MPS control daemon process")
        return 1
    for line in sys.stdin:
        connection.sendall(line.encode())
        print(connection.makefile().readline().rstrip("\n").replace(";", "\n"), end="")
    return 0


def daemon() -> int:
    behaviour = os.environ.get("FAKE_MPS_DAEMON", "")
    if behaviour == "fails":
        print("Insufficient permissions", flush=True)
        return 1
    if behaviour == "slow":
        time.sleep(0.5)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(PIPE_DIR / "control"))
    listener.listen()
    (PIPE_DIR / "environment").write_text("\n".join(sorted(os.environ)))
    servers: list[subprocess.Popen[bytes]] = []
    while True:
        connection, _ = listener.accept()
        command = connection.makefile().readline().split()
        note(command)
        if behaviour == "mute" or (behaviour == "stubborn" and command == ["quit"]):
            time.sleep(60)
        connection.sendall(answer(command, servers).encode() + b"\n")
        if command == ["quit"]:
            return 0


def behaves(name: str) -> bool:
    return os.environ.get("FAKE_MPS_DAEMON") == name


def note(command: list[str]) -> None:
    if "CUDA_MPS_LOG_DIRECTORY" in os.environ:
        with (Path(os.environ["CUDA_MPS_LOG_DIRECTORY"]) / "commands").open("a") as file:
            file.write(f"{os.getpid()} {' '.join(command)}\n")


def answer(command: list[str], servers: list["subprocess.Popen[bytes]"]) -> str:
    match command:
        case ["start_server", *_]:
            servers.append(subprocess.Popen(["nvidia-cuda-mps-server", "60"], executable="/bin/sleep"))
        case ["get_server_status", *_]:
            status = PIPE_DIR / "status"
            return status.read_text() if status.exists() else "ACTIVE"
        case [name, *_] if "default" in name or name.startswith("get_active"):
            return answer_about_limits(command)
        case ["get_server_list"]:
            for server in servers:
                server.poll()
            servers[:] = [server for server in servers if server.returncode is None]
            return ";".join(str(server.pid) for server in servers)
        case ["get_client_list", pid] if int(pid) in [server.pid for server in servers]:
            clients = PIPE_DIR / "clients"
            return ";".join(clients.read_text().split()) if clients.exists() else ""
        case ["terminate_client", server_pid, client_pid] if f"{client_pid}" in answer(
            ["get_client_list", server_pid], servers
        ).split(";"):
            return ""
        case ["quit"]:
            if os.environ.get("FAKE_MPS_DAEMON") != "leaves-server":
                for server in servers:
                    server.kill()
                    server.wait()
        case _:
            return "Command failed"
    return ""


def answer_about_limits(command: list[str]) -> str:
    match command:
        case ["set_default_active_thread_percentage", percent]:
            (PIPE_DIR / "share").write_text(f"{float(percent)}")
            return f"{float(percent)}"
        case ["get_default_active_thread_percentage"] | ["get_active_thread_percentage", _]:
            share = PIPE_DIR / "share"
            return share.read_text() if share.exists() and not behaves("forgets") else "100.0"
        case ["set_default_device_pinned_mem_limit", device, limit]:
            (PIPE_DIR / f"limit{device}").write_text(limit)
        case ["get_default_device_pinned_mem_limit", device]:
            limit_file = PIPE_DIR / f"limit{device}"
            return limit_file.read_text() if limit_file.exists() and not behaves("forgets") else "0G"
        case _:
            return "Command failed"
    return ""


if __name__ == "__main__":
    sys.exit(daemon() if sys.argv[1:] == ["-f"] else client())
