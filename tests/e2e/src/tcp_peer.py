"""One end of one TCP connection: follows a script and prints what it sees, one event per line.

    tcp_peer.py SIDE-CHANNEL listen STEP...
    tcp_peer.py SIDE-CHANNEL connect ADDRESS STEP...
    tcp_peer.py - connect-port ADDRESS PORT STEP...

The listening end says its port to the other end over the side channel, a unix socket that knows
nothing of network namespaces. Every event is told there too, so that one end can `await` what the
other has seen. Each end sends a byte stream of its own that the other knows: every received byte
is compared. Lines that begin with `#` are measurements, not events.

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

DEADLINE = 90.0  # no step waits longer for progress
BLOCKED = 2.0  # a sender that makes no progress for this long is blocked
PERIOD = 1_000_003  # prime, so that no buffer size hides a shift of the stream
CHUNK = 512 * 1024
UNITS = {"k": 1024, "M": 1024**2, "G": 1024**3}
BROKEN = {errno.ECONNRESET: "rst", errno.EPIPE: "broken pipe", errno.ETIMEDOUT: "timeout"}


class Ended(Exception):
    """The connection ended in a way that leaves nothing for the rest of the script."""


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
            give_up = time.monotonic() + DEADLINE
            # The path appears by a rename when the other end accepts.
            while self.socket.connect_ex(path) != 0:
                if time.monotonic() > give_up:
                    raise SystemExit("the other end did not start")
                time.sleep(0.005)
        self.socket.settimeout(DEADLINE)
        self.lines = self.socket.makefile("r")

    def tell(self, line):
        try:
            self.socket.sendall((line + "\n").encode())
        except OSError:
            pass  # the other end has finished its script

    def wait(self, event):
        for line in self.lines:
            if line.startswith(event):
                return line.strip()
        raise SystemExit(f"the other end stopped before it said {event!r}")


class Nobody:
    """The side channel of an end that has no scripted other end."""

    def tell(self, line):
        pass


class End:
    def __init__(self, side_channel, side, other):
        self.channel = side_channel
        self.mine, self.theirs = stream(side), stream(other)
        self.sent = self.received = 0
        self.socket, self.began = None, time.monotonic()

    def event(self, text):
        print(text, flush=True)
        self.channel.tell(text)

    def ready(self, events, seconds):
        """Whether the socket became readable or writable in time."""
        poll = select.poll()
        poll.register(self.socket, events)
        return bool(poll.poll(seconds * 1000))

    def wait_ready(self, events, what):
        if not self.ready(events, DEADLINE):
            self.event(f"nothing for {DEADLINE:.0f} s: {what}")
            raise Ended

    def read(self, limit):
        """Bytes, or how the stream ended: "fin", "rst"."""
        self.wait_ready(select.POLLIN, "receive")
        try:
            return self.socket.recv(limit) or "fin"
        except OSError as error:
            return BROKEN.get(error.errno, str(error))

    def write(self, limit):
        """Offers bytes once; false when the connection broke (which was said)."""
        at = self.sent % PERIOD
        try:
            self.sent += self.socket.send(memoryview(self.mine)[at : at + min(limit, CHUNK)])
            return True
        except BlockingIOError:
            return True
        except OSError as error:
            self.event("send: " + BROKEN.get(error.errno, str(error)))
            return False

    def push(self, end):
        """Sends until the kernel has taken all up to `end`."""
        while self.sent < end:
            self.wait_ready(select.POLLOUT, "send")
            if not self.write(end - self.sent):
                raise Ended

    def check(self, data):
        if not self.theirs.startswith(data, self.received % PERIOD):
            self.event(f"corrupt within {len(data)} bytes at {self.received}")
            raise Ended
        if self.received == 0:
            print(f"# first byte after {time.monotonic() - self.began:.4f} s")
        self.received += len(data)

    # The steps.

    def send(self, count):
        """Sends; says so when the kernel has taken all of it."""
        self.push(self.sent + amount(count))
        self.event(f"sent {amount(count)}")

    def overfill(self, count):
        """Sends more than all buffers take, to an end that does not read before this one is blocked."""
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
        """Sends until it is blocked."""
        while self.ready(select.POLLOUT, BLOCKED):
            if self.sent == end:
                self.event("never blocked")
                raise Ended
            if not self.write(end - self.sent):
                raise Ended
        print(f"# blocked after {self.sent}")
        self.event("blocked")

    def both(self, count):
        """Sends and receives this much at the same time."""
        send_end, receive_end = self.sent + amount(count), self.received + amount(count)
        while self.sent < send_end or self.received < receive_end:
            poll = select.poll()
            wanted = select.POLLOUT if self.sent < send_end else 0
            wanted |= select.POLLIN if self.received < receive_end else 0
            poll.register(self.socket, wanted)
            if not (ready := poll.poll(DEADLINE * 1000)):
                self.event("nothing moves")
                raise Ended
            if ready[0][1] & select.POLLOUT and not self.write(send_end - self.sent):
                raise Ended
            if ready[0][1] & ~select.POLLOUT:
                self.recv_once(receive_end - self.received)
        self.event(f"exchanged {amount(count)} intact")

    def drip(self, count, seconds):
        """Sends in equal parts, one each 250 ms."""
        parts = int(float(seconds) * 4)
        start, end = time.monotonic(), self.sent + amount(count)
        for part in range(1, parts + 1):
            time.sleep(max(0.0, start + part / 4 - time.monotonic()))
            goal = end - amount(count) * (parts - part) // parts
            self.push(goal)
        self.event(f"sent {amount(count)}")

    def dribble(self, count):
        """Sends single bytes, each as a packet of its own."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = self.sent + amount(count)
        while self.sent < end:
            self.wait_ready(select.POLLOUT, "send")
            if not self.write(1):
                raise Ended
        self.event(f"sent {amount(count)}")

    def recv_once(self, missing):
        data = self.read(min(CHUNK, missing))
        if isinstance(data, str):
            self.event(f"{data}, {missing} bytes missing")
            raise Ended
        self.check(data)

    def recv(self, count):
        """Receives exactly this much."""
        end = self.received + amount(count)
        while self.received < end:
            self.recv_once(end - self.received)
        self.event(f"received {amount(count)} intact")

    def drain(self, how="all"):
        """Receives until FIN or RST. `some`: how much arrives before it is left to chance."""
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
        """Nothing at all arrives for this long: no byte, no end."""
        if self.ready(select.POLLIN | select.POLLRDHUP, float(seconds)):
            self.event("not quiet")
            self.drain()
            raise Ended
        self.event("quiet")

    def stop(self, seconds):
        """Reads nothing for this long, whatever there is."""
        time.sleep(float(seconds))

    def keepalive(self, seconds):
        """Lets the kernel probe an idle connection this often; five in a row are answered late at worst."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            self.socket.setsockopt(socket.IPPROTO_TCP, option, int(seconds))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)

    def small_window(self):
        """From now on little is accepted ahead of being read."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def shut(self):
        self.socket.shutdown(socket.SHUT_WR)
        self.event("shut")

    def close(self):
        self.socket.close()
        self.event("closed")

    def reset(self):
        """Closes with RST: what is not yet sent is thrown away."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
        self.event("reset")

    def wait_for(self, *event):
        """`await EVENT`: until the other end has seen it."""
        self.channel.wait(" ".join(event))

    def hold(self):
        """Until the test writes a line to stdin."""
        self.event("holding")
        sys.stdin.readline()

    def follow(self, script):
        try:
            for step in script:
                name, *arguments = step.split()
                getattr(self, {"await": "wait_for"}.get(name, name))(*arguments)
        except Ended:
            pass


def listen(path, script):
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        listener.settimeout(DEADLINE)
        channel = SideChannel(path, listens=True)
        channel.tell(f"listening {listener.getsockname()[1]}")
        end = End(channel, "server", "client")
        end.socket, peer = listener.accept()
        print(f"# accepted from {peer[0]}")
        end.event("accepted")
    end.socket.setblocking(False)
    end.follow(script)


def connect(path, address, script):
    channel = SideChannel(path, listens=False)
    port = int(channel.wait("listening").split()[1])
    connect_port(channel, address, port, script)


def connect_port(channel, address, port, script):
    end = End(channel, "client", "server")
    start = time.monotonic()
    try:
        end.socket = socket.create_connection((address, port), timeout=DEADLINE)
    except ConnectionRefusedError:
        return end.event("refused")
    except ConnectionResetError:
        # It was there, and was reset before this program had its turn.
        end.event("connected")
        return end.event("rst")
    print(f"# connected in {time.monotonic() - start:.4f} s")
    end.event("connected")
    end.socket.setblocking(False)
    end.follow(script)


if __name__ == "__main__":
    side_channel, role, *rest = sys.argv[1:]
    if role == "listen":
        listen(side_channel, rest)
    elif role == "connect":
        connect(side_channel, rest[0], rest[1:])
    else:
        connect_port(Nobody(), rest[0], int(rest[1]), rest[2:])
