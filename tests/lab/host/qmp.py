"""Runs QMP commands on a QEMU, for the comparison: qmp.py SOCKET COMMAND [JSON] [COMMAND [JSON]]…

The command "await-migration [postcopy-after=SECONDS]" waits until a migration has ended and prints
its figures; it ends with 1 if that failed.
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
        self.run("qmp_capabilities")

    def run(self, name, arguments=None):
        request = {"execute": name} | ({"arguments": arguments} if arguments else {})
        self.file.write(json.dumps(request) + "\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "return" in answer or "error" in answer:
                return answer

    def await_migration(self, postcopy_after):
        began = time.monotonic()
        while True:
            state = self.run("query-migrate").get("return", {})
            late = postcopy_after is not None and time.monotonic() - began >= postcopy_after
            if late and state.get("status") == "active":
                self.run("migrate-start-postcopy")
                postcopy_after = None
            if state.get("status") in ("completed", "failed", "cancelled"):
                print(json.dumps(state))
                return state["status"] == "completed"
            time.sleep(0.05)


monitor, words, ok = Monitor(sys.argv[1]), sys.argv[2:], True
while words:
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
