"""Errors of CUDA after which a process's context is of no use any more, named in words.

Numbers and meanings: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TYPES.html (CUresult). Torch puts the
runtime's name or its text into the message of an exception.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """An error that ends a context: its number, its names, a piece of the driver's text, what it means, what to do."""

    code: int
    runtime: str
    driver: str
    text: str
    meaning: str
    advice: str

    def __str__(self) -> str:
        return f"CUDA error {self.code} ({self.driver}): {self.meaning}; {self.advice}"


_LOG = "see its server.log in CUDA_MPS_LOG_DIRECTORY"
_SERVER = (
    (805, "MpsConnectionFailed", "MPS_CONNECTION_FAILED", "failed to connect to the MPS control daemon or the MPS",
     "this process could not connect to the CUDA MPS daemon or its server",
     f"check that the daemon runs for this user and that CUDA_MPS_PIPE_DIRECTORY is its directory; {_LOG}"),
    (806, "MpsRpcFailure", "MPS_RPC_FAILURE", "between the MPS server and the MPS client failed",
     "the CUDA MPS server no longer answers this process, most likely because it has ended",
     f"start again; {_LOG}"),
    (807, "MpsServerNotReady", "MPS_SERVER_NOT_READY", "not ready to accept new MPS client requests",
     "the CUDA MPS server takes no clients while it recovers from a client's fault",
     "end the clients that it still has, or wait for them, then start again"),
    (808, "MpsMaxClientsReached", "MPS_MAX_CLIENTS_REACHED", "required to create MPS client have been exhausted",
     "the CUDA MPS server has as many clients as the GPU allows (48 or 60)",
     "use fewer --workers, or end other clients"),
    (809, "MpsMaxConnectionsReached", "MPS_MAX_CONNECTIONS_REACHED", "device connections have been exhausted",
     "the clients of the CUDA MPS server use up the GPU's hardware queues",
     "use fewer --workers, or set CUDA_DEVICE_MAX_CONNECTIONS to a smaller number"),
    (810, "MpsClientTerminated", "MPS_CLIENT_TERMINATED", "MPS client has been terminated by the server",
     "the CUDA MPS server has ended this client, because somebody asked it to or because another client failed",
     "start again; the first failure in time is the one to look at"),
)  # fmt: skip
_KERNEL = "a kernel of this process, or of another client of the same CUDA MPS server, failed"
_ADVICE = "start again; where it comes back, CUDA_LAUNCH_BLOCKING=1 names the op"
_CONTEXT = (
    (700, "IllegalAddress", "ILLEGAL_ADDRESS", "illegal memory access"),
    (702, "LaunchTimeout", "LAUNCH_TIMEOUT", "launch timed out"),
    (710, "Assert", "ASSERT", "device-side assert triggered"),
    (714, "HardwareStackError", "HARDWARE_STACK_ERROR", "hardware stack error"),
    (715, "IllegalInstruction", "ILLEGAL_INSTRUCTION", "illegal instruction"),
    (716, "MisalignedAddress", "MISALIGNED_ADDRESS", "misaligned address"),
    (717, "InvalidAddressSpace", "INVALID_ADDRESS_SPACE", "operation not supported on global/shared address space"),
    (718, "InvalidPc", "INVALID_PC", "invalid program counter"),
    (719, "LaunchFailure", "LAUNCH_FAILED", "unspecified launch failure"),
)
FAULTS = tuple(
    Fault(code, f"cudaError{runtime}", f"CUDA_ERROR_{driver}", text, meaning, advice)
    for code, runtime, driver, text, meaning, advice in (*_SERVER, *((*row, _KERNEL, _ADVICE) for row in _CONTEXT))
)


def find(message: str) -> Fault | None:
    """Return the error that a message of CUDA or torch tells of; None for any other message."""
    if not re.search(r"cuda", message, re.IGNORECASE):
        return None
    names = set(re.findall(r"\b(?:cudaError|CUDA_ERROR_)\w+", message))
    for fault in FAULTS:
        if names & {fault.runtime, fault.driver}:
            return fault
    return next((fault for fault in FAULTS if fault.text in message), None)
