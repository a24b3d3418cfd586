"""A host's board: what its scripts tell the other host's, which wait for it (post and peer in lib.sh).

One request for each connection, on port 80. "post NAME VALUE" puts a value up. "wait NAME" is answered as soon as it is there,
with "is VALUE"; once something is posted as "died", every other wait with "died".
"""

import socketserver
import threading

posted, changed = {}, threading.Condition()


class Request(socketserver.StreamRequestHandler):
    def handle(self):
        verb, name, *value = self.rfile.readline().decode().rstrip("\n").split(" ", 2)
        with changed:
            if verb == "post":
                posted[name] = value[0]
                changed.notify_all()
            changed.wait_for(lambda: name in posted or "died" in posted)
            answer = f"is {posted[name]}" if name in posted else "died"
        try:
            self.wfile.write(f"{answer}\n".encode())
        except OSError:
            pass  # It has waited long enough.


socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer.daemon_threads = True
socketserver.ThreadingTCPServer(("", 80), Request).serve_forever()
