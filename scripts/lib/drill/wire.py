"""The frames of the stream (docs/protocol.md), as far as a link in between has to know them."""

import json
import struct
from dataclasses import dataclass, replace

HEADER_BYTES = 48
MAGIC = b"VMFY"
KINDS = {
    "HELLO": 1, "HELLO_ACK": 2, "REFUSED": 3, "MACHINE": 4, "ACCEPTED": 5, "JOIN": 6, "JOINED": 7,
    "PAGES": 16, "BARRIER": 17, "PASS_DONE": 18, "STATE": 32, "END": 33, "READY": 34, "RUN": 35,
    "RUNNING": 36, "REVOKE": 37, "REVOKED": 38, "ABORT": 48, "DONE": 49, "PING": 50, "PONG": 51,
    "MISSING": 64, "PAGE_REQUEST": 65, "RECEIVED": 66,
}
NAMES = {number: name for name, number in KINDS.items()}
_LAYOUT = struct.Struct("<4sHHII16sQI")


def _table():
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        yield byte


_CRC = list(_table())


def crc32c(data):
    """CRC-32C (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@dataclass
class Header:
    kind: str
    payload_bytes: int
    epoch: int
    session: bytes
    sequence: int
    body_crc: int

    @classmethod
    def decode(cls, data):
        """None where `data` is no header."""
        magic, kind, _, length, epoch, session, sequence, body = _LAYOUT.unpack(data[:44])
        if magic != MAGIC:
            return None
        return cls(NAMES.get(kind, str(kind)), length, epoch, session, sequence, body)

    def encode(self):
        kind = KINDS[self.kind]
        data = _LAYOUT.pack(
            MAGIC, kind, 0, self.payload_bytes, self.epoch, self.session, self.sequence, self.body_crc
        )
        return data + struct.pack("<I", crc32c(data))


def frame(kind, payload, session, epoch=1, sequence=0):
    """A whole frame with a correct header."""
    return Header(kind, len(payload), epoch, session, sequence, crc32c(payload)).encode() + payload


def rewritten(header, payload, change):
    """The frame again, with the payload that `change` makes of its own."""
    payload = change(payload)
    return replace(header, payload_bytes=len(payload), body_crc=crc32c(payload)).encode() + payload


def of_json(change):
    """A change of a payload's JSON object, as one of the payload."""

    def changed(payload):
        value = json.loads(payload)
        change(value)
        return json.dumps(value).encode()

    return changed
