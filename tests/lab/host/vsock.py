"""The host's end of a guest's vsock connections, which are Unix sockets here (docs/devices.md).

Usage: vsock.py talk PATH PORT [LINES]  connects to the guest's program at PORT and has lines echoed, LINES or until the
                                        connection ends, then prints how many; ends with 1 if one comes back wrong
       vsock.py serve PATH              takes the guest's connections, one after the other, and echoes; prints
                                        each line that comes
"""

import os
import socket
import sys
import time

# In all more than a guest's credit for a connection; at one time less than all buffers between here and there.
LARGE, ON_ITS_WAY = b"".join(b"%07d\n" % n for n in range(64 << 10)), 128 << 10


def exchange(connection, piece):
    """Has `piece` echoed; `False` if the connection ends before."""
    got, sent = b"", 0
    while len(got) < len(piece):
        if sent < min(len(piece), len(got) + ON_ITS_WAY):
            sent += connection.send(piece[sent : sent + 8192])
            continue
        more = connection.recv(65536)
        if not more:
            return False
        got += more
    if got != piece:
        sys.exit(f"{piece[:20]!r}… comes back changed")
    return True


def talk(path, port, most):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    connection.connect(path)
    connection.sendall(b"CONNECT %d\n" % port)
    answer = b""
    while not answer.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            sys.exit("the guest does not answer")
        answer += byte
    if not answer.startswith(b"OK "):
        sys.exit(f"the guest says {answer!r}")
    lines = 0
    try:
        while lines != most and exchange(connection, LARGE if lines == 0 else b"line %d\n" % lines):
            lines += 1
            print(lines, flush=True)
            time.sleep(0.2)
    except (ConnectionResetError, BrokenPipeError):
        pass
    print(f"talked lines={lines}", flush=True)


def serve(path):
    listener = socket.socket(socket.AF_UNIX)
    if os.path.exists(path):
        os.unlink(path)
    listener.bind(path)
    listener.listen(4)
    while True:
        connection, _ = listener.accept()
        print("taken", flush=True)
        try:
            while piece := connection.recv(65536):
                connection.sendall(piece)
                print(piece.decode().strip(), flush=True)
        except (ConnectionResetError, BrokenPipeError):
            pass
        print("ended", flush=True)


words = sys.argv[1:]
if words[0] == "talk":
    talk(words[1], int(words[2]), int(words[3]) if len(words) > 3 else -1)
else:
    serve(words[1])
