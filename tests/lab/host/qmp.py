"""Runs QMP commands on a QEMU, for the comparison: qmp.py SOCKET COMMAND [JSON] [COMMAND [JSON]]…

The command "await-migration [postcopy-after=SECONDS]" waits until a migration has ended and prints
its figures; it ends with 1 if that failed. It needs the capability "events".
"""

import json
import socket
import sys
import time


class Monitor:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        until = time.monotonic() + 20
        while True:
            try:
                self.socket.connect(path)
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self.status = None
        self.run("qmp_capabilities")

    def message(self):
        """The next answer or event; what it says of a migration is kept."""
        message = json.loads(self.file.readline())
        if message.get("event") == "MIGRATION":
            self.status = message["data"]["status"]
        return message

    def run(self, name, arguments=None):
        request = {"execute": name} | ({"arguments": arguments} if arguments else {})
        self.file.write(json.dumps(request) + "\n")
        self.file.flush()
        while True:
            answer = self.message()
            if "return" in answer or "error" in answer:
                return answer

    def await_migration(self, postcopy_after):
        """By its events: whoever asks a busy host again and again slows down what it waits for."""
        if postcopy_after is not None:
            time.sleep(postcopy_after)
            self.run("migrate-start-postcopy")
        while self.status not in ("completed", "failed", "cancelled"):
            self.message()
        # How long it took is known a little later than that it has ended.
        while not (said := self.run("query-migrate").get("return", {})).get("total-time") and self.status == "completed":
            time.sleep(0.05)
        print(json.dumps(said))
        return self.status == "completed"


monitor, words, ok = Monitor(sys.argv[1]), sys.argv[2:], True
while words and ok:
    name = words.pop(0)
    if name == "await-migration":
        after = float(words.pop(0).partition("=")[2]) if words and words[0].startswith("postcopy-after=") else None
        ok &= monitor.await_migration(after)
    else:
        arguments = json.loads(words.pop(0)) if words and words[0].startswith("{") else None
        answer = monitor.run(name, arguments)
        ok &= "return" in answer
        print(json.dumps(answer.get("return", answer)), flush=True)
sys.exit(not ok)
