"""The link between two hosts in the drill's hand: a forwarder that knows the frames of the stream
and holds, changes, repeats, delays or loses what it is told to."""

import socket
import threading
import time

from programs import PATIENCE_S, Failed
from wire import HEADER_BYTES, Header, of_json, rewritten

TO_DEST, TO_SOURCE = "to the destination", "to the source"


class Held:
    """A frame that waits in the link."""

    def __init__(self, link, what):
        self._link, self._what, self.state = link, what, "awaited"

    def caught(self):
        """Waits until it has come."""
        self._link.await_state(f"{self._what} has come", lambda: self.state != "awaited")
        return self

    def let_go(self):
        with self._link.changed:
            self.state = "let go"
            self._link.changed.notify_all()


class Link:
    """Listens with `listener`, forwards to `dest` by way of `connect`, which gives a connected socket."""

    def __init__(self, listener, connect):
        self.port = listener.getsockname()[1]
        self.address = f"tcp:{listener.getsockname()[0]}:{self.port}"
        self.changed = threading.Condition(threading.RLock())
        self.rules, self.passed, self.connections, self.bytes_passed = [], {}, [], 0
        self.life, self.down, self.frozen, self.delay_s, self.cut_after_bytes = 0, False, False, 0.0, None
        self.recorded = None
        self._listener, self._connect, self._over = listener, connect, False
        threading.Thread(target=self._serve, daemon=True).start()

    # What a drill does to it.

    def hold(self, way, kind):
        """The next frame of that kind waits."""
        held = Held(self, f"{kind} {way}")
        self._rule(way, kind, held)
        return held

    def cut_at(self, way, kind):
        """The next frame of that kind is lost, and the link is down from then on."""
        self._rule(way, kind, "cut")

    def repeat(self, way, kind):
        """The next frame of that kind comes twice."""
        self._rule(way, kind, "repeat")

    def rewrite(self, way, kind, change):
        """The JSON of the next frame of that kind is changed."""
        self._rule(way, kind, of_json(change))

    def rewrite_bytes(self, way, kind, change):
        """The payload of the next frame of that kind is another one."""
        self._rule(way, kind, change)

    def cut_after(self, count):
        """The link is cut after `count` more bytes to the destination, in the middle of a frame or not."""
        with self.changed:
            self.cut_after_bytes = count

    def delay(self, seconds):
        """Each frame is that much later."""
        self.delay_s = seconds

    def cut(self):
        """Down from now on: connections end, new ones are closed at once."""
        with self.changed:
            self.down = True
            self.life += 1
            for connection in self.connections:
                _close(connection)
            self.connections.clear()
            self.changed.notify_all()

    def freeze(self):
        """Nothing passes any more, and nobody is told."""
        with self.changed:
            self.frozen = True

    def heal(self):
        with self.changed:
            self.down = self.frozen = False
            self.cut_after_bytes = None
            self.changed.notify_all()

    def record(self):
        """Keeps what is sent to the destination from now on, by connection, for a replay."""
        with self.changed:
            self.recorded = []

    def await_cut(self):
        self.await_state("the link is cut", lambda: self.down)

    def await_passed(self, way, kind, count=1):
        self.await_state(f"{kind} has passed {way}", lambda: self.count(way, kind) >= count)

    def count(self, way, kind):
        return self.passed.get((way, kind), 0)

    def close(self):
        self._over = True
        self.cut()
        _close(self._listener)

    def await_state(self, what, test, patience=PATIENCE_S):
        with self.changed:
            if not self.changed.wait_for(test, patience):
                raise Failed(f"never: {what}")

    # How it works.

    def _rule(self, way, kind, act):
        with self.changed:
            self.rules.append((way, kind, act))

    def _serve(self):
        while not self._over:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            if self.down:
                _close(caller)
                continue
            threading.Thread(target=self._join, args=(caller, self.life), daemon=True).start()

    def _join(self, caller, life):
        try:
            callee = self._connect()
        except OSError:
            _close(caller)
            return
        for end in (caller, callee):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.changed:
            if self.life != life:
                _close(caller), _close(callee)
                return
            self.connections += [caller, callee]
            record = None
            if self.recorded is not None:
                record = bytearray()
                self.recorded.append(record)
        for args in [(caller, callee, TO_DEST, life, record), (callee, caller, TO_SOURCE, life, None)]:
            threading.Thread(target=self._forward, args=args, daemon=True).start()

    def _forward(self, source, sink, way, life, record):
        try:
            while data := _read(source, HEADER_BYTES):
                header = Header.decode(data)
                if header is None:
                    break
                data = self._decide(way, header, data, _read(source, header.payload_bytes), life)
                if data is None:
                    break
                if self.delay_s:
                    time.sleep(self.delay_s)
                if not self._send(sink, data, way):
                    break
                with self.changed:
                    if record is not None:
                        record += data
                    self.bytes_passed += len(data)
                    key = (way, header.kind)
                    self.passed[key] = self.passed.get(key, 0) + 1
                    self.changed.notify_all()
        except OSError:
            pass
        try:
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def _send(self, sink, data, way):
        with self.changed:
            left = self.cut_after_bytes if way == TO_DEST else None
            if left is not None and left > len(data):
                self.cut_after_bytes = left - len(data)
                left = None
        if left is None:
            sink.sendall(data)
            return True
        sink.sendall(data[:left])
        self.cut()
        return False

    def _decide(self, way, header, head, payload, life):
        """What becomes of a frame; None when it is lost with its connection."""
        data = head + payload
        with self.changed:
            rule = next((r for r in self.rules if r[:2] == (way, header.kind)), None)
            if rule:
                self.rules.remove(rule)
                act = rule[2]
                if act == "cut":
                    self.cut()
                    return None
                if act == "repeat":
                    data += data
                elif isinstance(act, Held):
                    act.state = "caught"
                    self.changed.notify_all()
                    self.changed.wait_for(lambda: self.life != life or act.state == "let go")
                else:
                    data = rewritten(header, payload, act)
            self.changed.wait_for(lambda: self.life != life or not self.frozen)
            return data if self.life == life else None


def _read(source, count):
    """`count` bytes; nothing at the end of the stream."""
    data = bytearray()
    while len(data) < count:
        part = source.recv(min(1 << 20, count - len(data)))
        if not part:
            if data:
                raise OSError("ended within a frame")
            return b""
        data += part
    return bytes(data)


def _close(sock):
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()
