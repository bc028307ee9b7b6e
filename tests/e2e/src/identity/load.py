"""Load that goes on until it is told to end, and says of every connection how it went.

    load.py short ADDRESS PORT RATE     RATE connections a second, each one HTTP request
    load.py stream ADDRESS PORT RATE    one connection to an echo server, RATE KiB a second each way

Connections begin by the clock, however those before them fare. `short` prints a line for each:

    ok START END PORT
    failed START END PORT WHY

START and END are Unix times, PORT is the client's own. `stream` compares every byte that comes back;
it prints `streaming` after the first block, `echoed BYTES` at the end, and `failed` as soon as it
does not. Closing stdin ends both.

Needs python3-minimal only.
"""

import socket
import sys
import threading
import time

DEADLINE = 20.0  # of one wait; longer than any wait of a daemon
BLOCK = bytes(at * 131 % 251 for at in range(8 * 1024))
REQUEST = b"GET / HTTP/1.1\r\nHost: load\r\nConnection: close\r\n\r\n"
SAYING = threading.Lock()


def say(*words):
    with SAYING:
        print(*words, flush=True)


class Connection:
    def __init__(self, address, port):
        self.socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.socket.settimeout(DEADLINE)
        self.port = 0
        self.socket.connect((address, port))
        self.port = self.socket.getsockname()[1]

    def read(self, limit):
        data = b""
        while len(data) < limit:
            more = self.socket.recv(limit - len(data))
            if not more:
                break
            data += more
        return data


def report(work, start):
    """Runs the work on a connection and says how it went; the port is known once it is connected."""
    port = [0]
    try:
        done = work(port)
        say(*(done or ["ok", start, time.time(), port[0]]))
    except OSError as error:
        say("failed", start, time.time(), port[0], str(error).replace("\n", " ") or "timeout")


def short(address, port, own):
    connection = Connection(address, port)
    with connection.socket:
        own[0] = connection.port
        connection.socket.sendall(REQUEST)
        answer = connection.read(65536)
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise OSError(f"answer of {len(answer)} bytes")


def many_short(address, port, rate, ended):
    next_at = time.monotonic()
    running = []
    while not ended.wait(max(0, next_at - time.monotonic())):
        work = (lambda own: short(address, port, own), time.time())
        thread = threading.Thread(target=report, args=work)
        thread.start()
        running = [one for one in running if one.is_alive()] + [thread]
        next_at += 1 / rate
    for thread in running:
        thread.join()


def stream(address, port, rate, ended, own):
    connection = Connection(address, port)
    own[0] = connection.port
    next_at, echoed = time.monotonic(), 0
    while not ended.wait(max(0, next_at - time.monotonic())):
        connection.socket.sendall(BLOCK)
        if connection.read(len(BLOCK)) != BLOCK:
            raise OSError(f"other bytes came back after {echoed}")
        if echoed == 0:
            say("streaming")
        echoed += len(BLOCK)
        next_at += len(BLOCK) / 1024 / rate
    connection.socket.shutdown(socket.SHUT_WR)
    if connection.read(1):
        raise OSError("more came back than was sent")
    return ["echoed", echoed]


def until_stdin_ends(ended):
    sys.stdin.read()
    ended.set()


def main(kind, address, port, rate):
    ended = threading.Event()
    threading.Thread(target=until_stdin_ends, args=[ended], daemon=True).start()
    port, rate = int(port), float(rate)
    if kind == "short":
        many_short(address, port, rate, ended)
    else:
        report(lambda own: stream(address, port, rate, ended, own), time.time())


main(*sys.argv[1:])
