"""Keeps one TCP connection to an echo service busy, and checks that every byte comes back in order.

Usage: stream.py ADDRESS PORT STOP_FILE. Ends when STOP_FILE is there: prints what it saw, and ends
with 1 if the connection broke or a byte was wrong.
"""

import os
import socket
import sys
import time

address, port, stop = sys.argv[1], int(sys.argv[2]), sys.argv[3]
connection = socket.create_connection((address, port), timeout=30)
connection.settimeout(120)
sent, echoed, gap, last = 0, 0, 0.0, time.monotonic()
while not os.path.exists(stop):
    piece = b"".join(b"%012d\n" % (sent // 13 + n) for n in range(100))
    connection.sendall(piece)
    sent += len(piece)
    got = b""
    while len(got) < len(piece):
        more = connection.recv(len(piece) - len(got))
        if not more:
            sys.exit(f"the connection ended after {echoed + len(got)} bytes")
        got += more
        gap, last = max(gap, time.monotonic() - last), time.monotonic()
    if got != piece:
        sys.exit(f"bytes {echoed} to {echoed + len(got)} came back changed")
    echoed += len(got)
    time.sleep(0.02)
print(f"stream bytes={echoed} gap_s={gap:.2f}")
