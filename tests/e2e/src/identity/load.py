"""Makes connections until stdin is closed, and prints the result of each.

    load.py short ADDRESS PORT RATE     RATE connections per second, one HTTP request on each
    load.py stream ADDRESS PORT RATE    one connection to an echo server, RATE KiB per second each way

Connections start at fixed times, however long earlier ones take. `short` prints a line for each:

    ok START END PORT
    failed START END PORT REASON

START and END are Unix times, PORT is the client's own. `stream` compares every echoed byte. It
prints `streaming` after the first block, `echoed BYTES` at the end, and a `failed` line when the
connection fails or a byte differs.

Needs python3-minimal only.
"""

import socket
import sys
import threading
import time

TIMEOUT = 20.0  # seconds of one connect, send or receive; longer than any wait of a daemon
BLOCK = bytes(at * 131 % 251 for at in range(8 * 1024))
REQUEST = b"GET / HTTP/1.1\r\nHost: load\r\nConnection: close\r\n\r\n"
PRINT_LOCK = threading.Lock()


def print_line(*words):
    with PRINT_LOCK:
        print(*words, flush=True)


class Connection:
    def __init__(self, address, port):
        self.socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.socket.settimeout(TIMEOUT)
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


def run_and_print(work, start):
    """Runs `work` and prints its result. `work` stores the local port in `port` once connected."""
    port = [0]
    try:
        result = work(port)
        print_line(*(result or ["ok", start, time.time(), port[0]]))
    except OSError as error:
        reason = str(error).replace("\n", " ") or "timeout"
        print_line("failed", start, time.time(), port[0], reason)


def request(address, port, local_port):
    connection = Connection(address, port)
    with connection.socket:
        local_port[0] = connection.port
        connection.socket.sendall(REQUEST)
        response = connection.read(65536)
    if not response.startswith(b"HTTP/1.1 200 "):
        raise OSError(f"response of {len(response)} bytes")


def run_short(address, port, rate, stopped):
    next_start = time.monotonic()
    running = []
    while not stopped.wait(max(0, next_start - time.monotonic())):
        work = (lambda local_port: request(address, port, local_port), time.time())
        thread = threading.Thread(target=run_and_print, args=work)
        thread.start()
        running = [one for one in running if one.is_alive()] + [thread]
        next_start += 1 / rate
    for thread in running:
        thread.join()


def run_stream(address, port, rate, stopped, local_port):
    connection = Connection(address, port)
    local_port[0] = connection.port
    next_send, echoed = time.monotonic(), 0
    while not stopped.wait(max(0, next_send - time.monotonic())):
        connection.socket.sendall(BLOCK)
        if connection.read(len(BLOCK)) != BLOCK:
            raise OSError(f"wrong or missing echo after {echoed} bytes")
        if echoed == 0:
            print_line("streaming")
        echoed += len(BLOCK)
        next_send += len(BLOCK) / 1024 / rate
    connection.socket.shutdown(socket.SHUT_WR)
    if connection.read(1):
        raise OSError("more bytes were echoed than sent")
    return ["echoed", echoed]


def wait_stdin_closed(stopped):
    sys.stdin.read()
    stopped.set()


def main(kind, address, port, rate):
    stopped = threading.Event()
    threading.Thread(target=wait_stdin_closed, args=[stopped], daemon=True).start()
    port, rate = int(port), float(rate)
    if kind == "short":
        run_short(address, port, rate, stopped)
    else:
        run_and_print(
            lambda local_port: run_stream(address, port, rate, stopped, local_port), time.time()
        )


main(*sys.argv[1:])
