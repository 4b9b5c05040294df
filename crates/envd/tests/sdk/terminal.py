"""Terminals through the published Python SDK (e2b 2.45.1 and 2.63.0), which talks to one envd on this machine.

    envd --standalone --port 49983 &
    E2B_DEBUG=true E2B_API_KEY=e2b_00 python terminal.py

Exits with an error at the first thing that is not as it should be. Not named pty.py: the SDK's own imports would find it instead of
Python's module of that name.
"""

import asyncio
import os
import sys

from e2b import AsyncSandbox, CommandExitException, NotFoundException, PtySize, Sandbox

assert os.environ.get("E2B_DEBUG") == "true", "this script must not reach any real sandbox"


class Screen:
    """What a terminal has said so far, read piece by piece from its handle."""

    def __init__(self, handle):
        self.pieces = iter(handle)
        self.text = ""

    def until(self, what):
        while what not in self.text:
            self.text += next(self.pieces)[2].decode()


def raises(kind, action):
    try:
        action()
    except kind as raised:
        return raised
    raise AssertionError(f"no {kind.__name__}")


def conversation(pty):
    handle = pty.create(PtySize(rows=30, cols=100), envs={"OWN": "va lue"}, cwd="/usr", timeout=30)
    screen = Screen(handle)
    # The echo of a line must not be taken for its answer: what is waited for stands in none of the lines.
    pty.send_stdin(handle.pid, b"echo [$(stty size)] $TERM $OWN $PWD. $((40+2))\n")
    screen.until("[30 100] xterm-256color va lue /usr. 42\r\n")
    pty.resize(handle.pid, PtySize(rows=5, cols=70))
    pty.send_stdin(handle.pid, b"echo [$(stty size)]\n")
    screen.until("[5 70]\r\n")
    # Control characters are signals.
    pty.send_stdin(handle.pid, b"sh -c 'echo beg$((1))n; exec sleep 1000'\n")
    # Said by the one in the foreground, so the signal is his and not the shell's.
    screen.until("beg1n")
    pty.send_stdin(handle.pid, b"\x03")
    # What is typed ahead of it goes with the signal.
    screen.until("^C")
    pty.send_stdin(handle.pid, "echo hällo$((1+1)); exit 3\n".encode())
    screen.until("hällo2\r\n")
    failed = raises(CommandExitException, handle.wait)
    assert failed.exit_code == 3, failed
    raises(NotFoundException, lambda: pty.send_stdin(handle.pid, b"too late"))


def kill(pty):
    handle = pty.create(PtySize(rows=24, cols=80))
    assert pty.kill(handle.pid) is True
    assert raises(CommandExitException, handle.wait).exit_code != 0
    assert pty.kill(handle.pid) is False
    handle = pty.create(PtySize(rows=24, cols=80), user="nobody")
    screen = Screen(handle)
    pty.send_stdin(handle.pid, b"echo [$(id -u)]\n")
    screen.until("[65534]\r\n")
    assert handle.kill() is True


def connect(pty):
    handle = pty.create(PtySize(rows=24, cols=80))
    handle.disconnect()
    again = pty.connect(handle.pid)
    screen = Screen(again)
    pty.send_stdin(handle.pid, b"echo $((6*7)).\n")
    screen.until("42.\r\n")
    pty.send_stdin(handle.pid, b"exit\n")
    assert again.wait().exit_code == 0


async def asynchronous():
    pty = (await AsyncSandbox.create()).pty
    said, seen = [], asyncio.Event()

    def on_data(data):
        said.append(data)
        if b"42.\r\n" in b"".join(said):
            seen.set()

    handle = await pty.create(PtySize(rows=24, cols=80), on_data=on_data)
    await pty.send_stdin(handle.pid, b"echo $((6*7)).\n")
    await asyncio.wait_for(seen.wait(), 10)
    await pty.resize(handle.pid, PtySize(rows=10, cols=20))
    assert await pty.kill(handle.pid) is True


def main():
    pty = Sandbox.create().pty
    for check in (conversation, kill, connect):
        check(pty)
        print(f"{check.__name__}: right")
    asyncio.run(asynchronous())
    print("asynchronous: right")


if __name__ == "__main__":
    main()
    # Now: with threads of the SDK's native client still at work, the interpreter's own end crashes once in a while (2.63.0).
    sys.stdout.flush()
    os._exit(0)
