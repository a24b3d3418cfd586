"""Compares another machine's wall clock with this one's, by ICMP timestamps (RFC 792): the other's
kernel answers them by itself, with its clock in whole milliseconds since midnight.

Usage: clock.py ADDRESS [--was MS --limit MS] [--set]. Prints how far the other is ahead. Of many answers the one
that was back soonest counts, and half of its round trip is what is not known. Ends with 1 if that
has surely changed by more than the limit. --set turns this machine's clock to the other's.
"""

import os
import socket
import struct
import sys
import time

REQUEST, REPLY, DAY_MS = 13, 14, 86_400_000
SAMPLES, WITHIN_S, EVERY_S = 30, 20, 0.05


def checksum(message):
    total = sum(struct.unpack(f"!{len(message) // 2}H", message))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def request(number):
    parts = [REQUEST, 0, 0, os.getpid() & 0xFFFF, number, 0, 0, 0]
    parts[2] = checksum(struct.pack("!BBHHHIII", *parts))
    return struct.pack("!BBHHHIII", *parts)


def ask(link, address, number):
    """One answer: how far the other is ahead, and how long it took, in milliseconds; None without one."""
    sent = time.time()
    link.sendto(request(number), (address, 0))
    until = time.monotonic() + 2
    while (left := until - time.monotonic()) > 0:
        link.settimeout(left)
        try:
            packet = link.recv(1500)
        except TimeoutError:
            return None
        got = time.time()
        message = packet[(packet[0] & 15) * 4 :]
        if len(message) < 20:
            continue
        kind, _, _, ident, sequence, _, there, _ = struct.unpack("!BBHHHIII", message[:20])
        if (kind, ident, sequence) != (REPLY, os.getpid() & 0xFFFF, number):
            continue
        # A time that was cut to milliseconds is half of one later on the average.
        ahead = there + 0.5 - (sent + got) / 2 % 86_400 * 1000
        return (ahead + DAY_MS / 2) % DAY_MS - DAY_MS / 2, (got - sent) * 1000
    return None


def main():
    address, rest = sys.argv[1], sys.argv[2:]
    number_after = lambda word: float(rest[rest.index(word) + 1])
    link = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    answers, until = [], time.monotonic() + WITHIN_S
    for number in range(SAMPLES):
        if answer := ask(link, address, number):
            answers.append(answer)
        if time.monotonic() > until:
            break
        time.sleep(EVERY_S)
    if not answers:
        sys.exit(f"{address} does not tell its time")
    ahead, round_trip = min(answers, key=lambda answer: answer[1])
    print(f"offset_ms={ahead:.1f} unsure_ms={round_trip / 2 + 0.5:.1f}")
    if "--set" in rest:
        time.clock_settime(time.CLOCK_REALTIME, time.time() + ahead / 1000)
    if "--limit" in rest and abs(ahead - number_after("--was")) - round_trip / 2 > number_after("--limit"):
        sys.exit(1)


main()
