"""One end of a TCP connection: executes the steps of a script and prints one event per line.

    tcp_peer.py SIDE-CHANNEL listen STEP...
    tcp_peer.py SIDE-CHANNEL connect ADDRESS STEP...
    tcp_peer.py - connect-port ADDRESS PORT STEP...

The listening end sends its port to the other end over the side channel, a unix socket, which works
across network namespaces. Every event is sent there too, so that one end can `await` an event of the
other. Each end sends its own fixed byte stream, and the other end compares every received byte.
Lines that begin with `#` are measurements, not events.

Needs python3-minimal only.
"""

import errno
import hashlib
import os
import select
import socket
import struct
import sys
import time

DEADLINE = 90.0  # seconds that a step may wait for progress
BLOCKED = 2.0  # seconds without progress after which a sender counts as blocked
PERIOD = 1_000_003  # bytes; prime, so that no buffer size hides a shift of the stream
CHUNK = 512 * 1024
UNITS = {"k": 1024, "M": 1024**2, "G": 1024**3}
ERROR_NAMES = {errno.ECONNRESET: "rst", errno.EPIPE: "broken pipe", errno.ETIMEDOUT: "timeout"}


class ScriptEnded(Exception):
    """The connection ended, so the rest of the script cannot run."""


def stream(side):
    period = hashlib.shake_128(side.encode()).digest(PERIOD)
    return period + period[:CHUNK]


def amount(text):
    return int(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else int(text)


class SideChannel:
    def __init__(self, path, listens):
        if listens:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path + ".new")
            listener.listen(1)
            os.rename(path + ".new", path)
            listener.settimeout(DEADLINE)
            self.socket = listener.accept()[0]
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            deadline = time.monotonic() + DEADLINE
            # The other end creates the path by a rename once it listens.
            while self.socket.connect_ex(path) != 0:
                if time.monotonic() > deadline:
                    raise SystemExit("the other end did not start")
                time.sleep(0.005)
        self.socket.settimeout(DEADLINE)
        self.lines = self.socket.makefile("r")

    def publish(self, line):
        try:
            self.socket.sendall((line + "\n").encode())
        except OSError:
            pass  # the other end has finished its script

    def wait(self, event):
        for line in self.lines:
            if line.startswith(event):
                return line.strip()
        raise SystemExit(f"the other end ended before its event {event!r}")


class NullChannel:
    """The side channel of an end whose other end has no script."""

    def publish(self, line):
        pass


class Endpoint:
    def __init__(self, side_channel, side, other):
        self.channel = side_channel
        self.mine, self.theirs = stream(side), stream(other)
        self.sent = self.received = 0
        self.socket, self.start = None, time.monotonic()

    def event(self, text):
        print(text, flush=True)
        self.channel.publish(text)

    def ready(self, events, seconds):
        """Whether the socket became readable or writable in time."""
        poll = select.poll()
        poll.register(self.socket, events)
        return bool(poll.poll(seconds * 1000))

    def wait_ready(self, events, what):
        if not self.ready(events, DEADLINE):
            self.event(f"no progress for {DEADLINE:.0f} s: {what}")
            raise ScriptEnded

    def read(self, limit):
        """Returns bytes, or how the stream ended: "fin", "rst"."""
        self.wait_ready(select.POLLIN, "receive")
        try:
            return self.socket.recv(limit) or "fin"
        except OSError as error:
            return ERROR_NAMES.get(error.errno, str(error))

    def write(self, limit):
        """Calls send once; returns false, after an event, if the connection failed."""
        at = self.sent % PERIOD
        try:
            self.sent += self.socket.send(memoryview(self.mine)[at : at + min(limit, CHUNK)])
            return True
        except BlockingIOError:
            return True
        except OSError as error:
            self.event("send: " + ERROR_NAMES.get(error.errno, str(error)))
            return False

    def push(self, end):
        """Sends until the kernel has accepted everything up to stream position `end`."""
        while self.sent < end:
            self.wait_ready(select.POLLOUT, "send")
            if not self.write(end - self.sent):
                raise ScriptEnded

    def check(self, data):
        if not self.theirs.startswith(data, self.received % PERIOD):
            self.event(f"corrupt within {len(data)} bytes at {self.received}")
            raise ScriptEnded
        if self.received == 0:
            print(f"# first byte after {time.monotonic() - self.start:.4f} s")
        self.received += len(data)

    # The steps.

    def send(self, count):
        """Sends this much; the event follows when the kernel has accepted all of it."""
        self.push(self.sent + amount(count))
        self.event(f"sent {amount(count)}")

    def overfill(self, count):
        """Sends more than all buffers hold: blocks first, and finishes once the other end reads."""
        end = self.sent + amount(count)
        self.fill(end)
        self.push(end)
        self.event(f"sent {amount(count)}")

    def send_until_broken(self):
        while True:
            self.wait_ready(select.POLLOUT, "send")
            if not self.write(CHUNK):
                return

    def fill(self, end=sys.maxsize):
        """Sends until blocked."""
        while self.ready(select.POLLOUT, BLOCKED):
            if self.sent == end:
                self.event("never blocked")
                raise ScriptEnded
            if not self.write(end - self.sent):
                raise ScriptEnded
        print(f"# blocked after {self.sent}")
        self.event("blocked")

    def exchange(self, count):
        """Sends and receives this much concurrently."""
        send_end, receive_end = self.sent + amount(count), self.received + amount(count)
        while self.sent < send_end or self.received < receive_end:
            poll = select.poll()
            wanted = select.POLLOUT if self.sent < send_end else 0
            wanted |= select.POLLIN if self.received < receive_end else 0
            poll.register(self.socket, wanted)
            if not (ready := poll.poll(DEADLINE * 1000)):
                self.event("no progress")
                raise ScriptEnded
            if ready[0][1] & select.POLLOUT and not self.write(send_end - self.sent):
                raise ScriptEnded
            if ready[0][1] & ~select.POLLOUT:
                self.recv_once(receive_end - self.received)
        self.event(f"exchanged {amount(count)} intact")

    def send_bytewise(self, count):
        """Sends single bytes, each in its own packet."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = self.sent + amount(count)
        while self.sent < end:
            self.wait_ready(select.POLLOUT, "send")
            if not self.write(1):
                raise ScriptEnded
        self.event(f"sent {amount(count)}")

    def recv_once(self, missing):
        data = self.read(min(CHUNK, missing))
        if isinstance(data, str):
            self.event(f"{data}, {missing} bytes missing")
            raise ScriptEnded
        self.check(data)

    def recv(self, count):
        """Receives exactly this much."""
        end = self.received + amount(count)
        while self.received < end:
            self.recv_once(end - self.received)
        self.event(f"received {amount(count)} intact")

    def drain(self, how="all"):
        """Receives until FIN or RST. With `some`, any amount may arrive before it."""
        before, start = self.received, None
        while not isinstance(data := self.read(CHUNK), str):
            start = start or time.monotonic()
            self.check(data)
        count, seconds = self.received - before, time.monotonic() - (start or time.monotonic())
        print(f"# received {count} in {seconds:.3f} s from its first byte")
        if how == "some":
            self.event("received some, intact")
        elif count:
            self.event(f"received {count} intact")
        self.event(data)

    def quiet(self, seconds):
        """Checks that neither data nor FIN nor RST arrives for this long."""
        if self.ready(select.POLLIN | select.POLLRDHUP, float(seconds)):
            self.event("not quiet")
            self.drain()
            raise ScriptEnded
        self.event("quiet")

    def pause(self, seconds):
        """Reads nothing for this long."""
        time.sleep(float(seconds))

    def keepalive(self, seconds):
        """Enables keepalive probes at this interval; five unanswered probes end the connection."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            self.socket.setsockopt(socket.IPPROTO_TCP, option, int(seconds))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)

    def small_window(self):
        """Sets a small receive buffer."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def shut(self):
        self.socket.shutdown(socket.SHUT_WR)
        self.event("shut")

    def close(self):
        self.socket.close()
        self.event("closed")

    def reset(self):
        """Closes with RST; unsent data is discarded."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
        self.event("reset")

    def wait_for(self, *event):
        """`await EVENT`: waits for an event of the other end."""
        self.channel.wait(" ".join(event))

    def hold(self):
        """Waits until the test writes a line to stdin."""
        self.event("holding")
        sys.stdin.readline()

    def run(self, script):
        try:
            for step in script:
                name, *arguments = step.split()
                getattr(self, {"await": "wait_for"}.get(name, name))(*arguments)
        except ScriptEnded:
            pass


def listen(path, script):
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        listener.settimeout(DEADLINE)
        channel = SideChannel(path, listens=True)
        channel.publish(f"listening {listener.getsockname()[1]}")
        end = Endpoint(channel, "server", "client")
        end.socket, peer = listener.accept()
        print(f"# accepted from {peer[0]}")
        end.event("accepted")
    end.socket.setblocking(False)
    end.run(script)


def connect(path, address, script):
    channel = SideChannel(path, listens=False)
    port = int(channel.wait("listening").split()[1])
    connect_port(channel, address, port, script)


def connect_port(channel, address, port, script):
    end = Endpoint(channel, "client", "server")
    start = time.monotonic()
    try:
        end.socket = socket.create_connection((address, port), timeout=DEADLINE)
    except ConnectionRefusedError:
        return end.event("refused")
    except ConnectionResetError:
        # Connected, and reset before this program ran again.
        end.event("connected")
        return end.event("rst")
    print(f"# connected in {time.monotonic() - start:.4f} s")
    end.event("connected")
    end.socket.setblocking(False)
    end.run(script)


if __name__ == "__main__":
    side_channel, role, *rest = sys.argv[1:]
    if role == "listen":
        listen(side_channel, rest)
    elif role == "connect":
        connect(side_channel, rest[0], rest[1:])
    else:
        connect_port(NullChannel(), rest[0], int(rest[1]), rest[2:])
