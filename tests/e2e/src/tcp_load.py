"""Opens or serves many TCP connections at once.

    tcp_load.py echo                        echoes; prints its port
    tcp_load.py concurrent ADDRESS PORT COUNT ROUNDS SIZE
                COUNT connections, all open before the first is closed, each with ROUNDS exchanges
    tcp_load.py short ADDRESS PORT COUNT AT-ONCE SIZE
                COUNT connections of one exchange each, AT-ONCE of them at any time
    tcp_load.py abort ADDRESS PORT COUNT AT-ONCE SIZE
                the same, but each is reset as soon as its bytes are sent
    tcp_load.py reset                       resets each connection at its first byte; prints its port, and a
                line for each reset
    tcp_load.py no-read                     accepts and never reads; prints its port
    tcp_load.py stalled ADDRESS PORT COUNT
                COUNT connections; sends on each until nothing is accepted for a second, and keeps
                them open until stdin is closed

A client prints `KEY VALUE` lines: completed connections, every kind of error with its count, times.
An exchange sends SIZE bytes and receives the same bytes. Needs python3-minimal only.
"""

import hashlib
import select
import socket
import struct
import sys
import time

DEADLINE = 100.0  # seconds of the whole run; connections that are not done by then are errors


def serve(resets=False):
    listener = socket.create_server(
        ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
    )
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    sockets, pending = {}, {}
    print("listening", listener.getsockname()[1], flush=True)
    while True:
        for fd, events in poll.poll():
            if fd == listener.fileno():
                accept(listener, poll, sockets)
            elif resets:
                reset(sockets.pop(fd))
                print("reset", flush=True)
            elif not echo(sockets[fd], fd, events, poll, pending):
                pending.pop(fd, None)
                sockets.pop(fd).close()


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def accept(listener, poll, sockets):
    while True:
        try:
            connection = listener.accept()[0]
        except BlockingIOError:
            return
        connection.setblocking(False)
        sockets[connection.fileno()] = connection
        poll.register(connection, select.EPOLLIN)


def echo(connection, fd, events, poll, pending):
    """Writes pending data or reads; returns false at the end of the connection."""
    try:
        data = pending.pop(fd, b"") if events & select.EPOLLOUT else connection.recv(65536)
        if not data:
            return False
        rest = data[connection.send(data) :]
    except BlockingIOError:
        rest = data
    except OSError:
        return False
    if rest:
        pending[fd] = rest
    poll.modify(fd, select.EPOLLOUT if rest else select.EPOLLIN)
    return True


class Client:
    """All connections of a run, in one epoll loop."""

    def __init__(self, address, port, count, at_once, rounds, size, concurrent=False, abort=False):
        self.abort = abort
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.family, self.target = family, (address, port)
        self.left, self.at_once, self.rounds, self.concurrent = count, at_once, rounds, concurrent
        self.count, self.max_open, self.done = count, 0, 0
        self.message = hashlib.shake_128(b"load").digest(size)
        self.poll, self.connections = select.epoll(), {}
        self.errors, self.times = {}, []
        self.parked = []  # connections that wait until all others have made their first exchange

    def run(self):
        start = time.monotonic()
        while self.done < self.count:
            while self.left and len(self.connections) < self.at_once:
                self.left -= 1
                Connection(self)
            if not (ready := self.poll.poll(5)) and time.monotonic() - start > DEADLINE:
                self.errors["not done at the deadline"] = self.count - self.done
                break
            for fd, events in ready:
                self.connections[fd].step(events)
        return time.monotonic() - start

    def exchanged(self, connection):
        """Starts the next exchange or the end of a connection, or parks it."""
        connection.round += 1
        if self.concurrent and connection.round == 1:
            self.parked.append(connection)
            self.resume_when_all_parked()
        else:
            connection.next()

    def resume_when_all_parked(self):
        if self.parked and len(self.parked) + self.done == self.count:
            self.max_open = len(self.parked)
            parked, self.parked = self.parked, []
            for connection in parked:
                connection.next()


class Connection:
    def __init__(self, client):
        self.client, self.round, self.got, self.closing = client, 0, 0, False
        self.socket = socket.socket(client.family)
        self.socket.setblocking(False)
        self.socket.connect_ex(client.target)
        client.connections[self.socket.fileno()] = self
        client.poll.register(self.socket, select.EPOLLOUT)
        self.to_send, self.began = client.message, time.monotonic()

    def step(self, events):
        try:
            if events & select.EPOLLOUT:
                self.to_send = self.to_send[self.socket.send(self.to_send) :]
                if not self.to_send and self.client.abort:
                    self.end(None)
                elif not self.to_send:
                    self.client.poll.modify(self.socket, select.EPOLLIN)
            else:
                self.receive(self.socket.recv(65536))
        except OSError as error:
            self.end(error.strerror)

    def receive(self, data):
        if not data:
            return self.end(None if self.closing else "early FIN")
        if self.closing or not self.client.message.startswith(data, self.got):
            return self.end("wrong bytes")
        self.got += len(data)
        if self.got == len(self.client.message):
            self.client.times.append(time.monotonic() - self.began)
            self.client.exchanged(self)

    def next(self):
        if self.round == self.client.rounds:
            self.closing = True  # ends with the server's FIN
            self.socket.shutdown(socket.SHUT_WR)
            return
        self.to_send, self.got, self.began = self.client.message, 0, time.monotonic()
        self.client.poll.modify(self.socket, select.EPOLLOUT)

    def end(self, error):
        if error:
            self.client.errors[error] = self.client.errors.get(error, 0) + 1
        del self.client.connections[self.socket.fileno()]
        if self.client.abort:
            reset(self.socket)
        self.socket.close()
        self.client.done += 1
        self.client.resume_when_all_parked()


def serve_without_reading():
    listener = socket.create_server(
        ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
    )
    print("listening", listener.getsockname()[1], flush=True)
    connections = []
    while True:
        connections.append(listener.accept())


def stall(address, port, count):
    poll, sockets, sent = select.epoll(), {}, 0
    for _ in range(count):
        connection = socket.create_connection((address, port))
        connection.setblocking(False)
        sockets[connection.fileno()] = connection
        poll.register(connection, select.EPOLLOUT)
    data = bytes(256 * 1024)
    while ready := poll.poll(1):
        for fd, _ in ready:
            sent += sockets[fd].send(data)
    print(f"blocked after {sent} bytes", flush=True)
    sys.stdin.read()


def report(client, seconds):
    print("completed", client.done - sum(client.errors.values()))
    print("errors", client.errors or 0)
    print("max-open", client.max_open)
    print(f"seconds {seconds:.2f}")
    times = sorted(client.times) or [0]
    print(f"p50-ms {times[len(times) // 2] * 1000:.2f}")
    print(f"slowest-ms {times[-1] * 1000:.2f}", flush=True)


def main(kind, address=None, port=0, count=0, middle=0, size=0):
    port, count, middle, size = int(port), int(count), int(middle), int(size)
    if kind in ("echo", "reset"):
        serve(resets=kind == "reset")
    elif kind == "no-read":
        serve_without_reading()
    elif kind == "stalled":
        stall(address, port, count)
    else:
        at_once, rounds = (count, middle) if kind == "concurrent" else (middle, 1)
        abort = kind == "abort"
        load = Client(address, port, count, at_once, rounds, size, kind == "concurrent", abort)
        report(load, load.run())


if __name__ == "__main__":
    main(*sys.argv[1:])
