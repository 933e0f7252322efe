"""Messages as bytes: msgpack through msgspec, checked against their types on the way in."""

from __future__ import annotations

from typing import Any

import msgspec

from mpsrun.errors import MpsrunError
from mpsrun.wire.messages import ToLead, ToWorker

LIMIT_BYTES = 64 << 20

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToWorker)
_to_lead: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToLead)


class BadMessage(MpsrunError):
    """Bytes that are no message of this protocol."""


def encode(message: ToWorker | ToLead) -> bytes:
    """The message as at most `LIMIT_BYTES` bytes; raises `BadMessage` where it would be larger."""
    data = _encoder.encode(message)
    if len(data) > LIMIT_BYTES:
        raise BadMessage(f"expected a message of at most {LIMIT_BYTES} bytes, found {len(data)}")
    return data


def decode_to_worker(data: bytes) -> ToWorker:
    """Read what the lead sent; raises `BadMessage` for anything else."""
    return _decode(_to_worker, data)


def decode_to_lead(data: bytes) -> ToLead:
    """Read what a worker sent; raises `BadMessage` for anything else."""
    return _decode(_to_lead, data)


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> Any:
    if len(data) > LIMIT_BYTES:
        raise BadMessage(f"expected a message of at most {LIMIT_BYTES} bytes, found {len(data)}")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadMessage(f"expected a message of mpsrun, found {data[:40]!r}: {error}") from error
