"""Commands through the published Python SDK (e2b 2.45.1 and 2.63.0), which talks to one envd on this machine.

    envd --standalone --port 49983 &
    E2B_DEBUG=true E2B_API_KEY=e2b_00 python commands.py

Exits with an error at the first thing that is not as it should be.
"""

import asyncio
import os
import sys
import time

from e2b import (
    AsyncSandbox,
    AuthenticationException,
    CommandExitException,
    NotFoundException,
    Sandbox,
    SandboxException,
    TimeoutException,
)

assert os.environ.get("E2B_DEBUG") == "true", "this script must not reach any real sandbox"


def raises(kind, action):
    try:
        action()
    except kind as raised:
        return raised
    raise AssertionError(f"no {kind.__name__}")


def until(what, is_so):
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end, f"not in time: {what}"
        time.sleep(0.01)


def pids(commands):
    return [process.pid for process in commands.list()]


def foreground(commands):
    result = commands.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr, result.exit_code, result.error) == ("out\n", "err\n", 0, None), result
    failed = raises(CommandExitException, lambda: commands.run("echo out; echo err >&2; exit 7"))
    assert (failed.stdout, failed.stderr, failed.exit_code) == ("out\n", "err\n", 7), failed
    failed = raises(CommandExitException, lambda: commands.run("no-such-program"))
    assert failed.exit_code == 127 and "no-such-program" in failed.stderr, failed
    # Characters of several bytes come whole, wherever the pieces of the output are cut.
    result = commands.run("""python3 -c 'print("äöü€😀" * 50000)'""")
    assert result.stdout == "äöü€😀" * 50000 + "\n"
    pieces = []
    result = commands.run("seq 1 20000; echo last >&2", on_stdout=pieces.append, on_stderr=pieces.append)
    expected = "".join(f"{n}\n" for n in range(1, 20001))
    assert result.stdout == expected and "".join(piece for piece in pieces if piece != "last\n") == expected
    assert "last\n" in pieces


def surroundings(commands):
    assert commands.run("echo $A-$B", envs={"A": "one", "B": "tw o"}).stdout == "one-tw o\n"
    assert commands.run("pwd", cwd="/usr/lib").stdout == "/usr/lib\n"
    raises(SandboxException, lambda: commands.run("pwd", cwd="/no/such/place"))
    assert commands.run("id -un; echo $USER", user="nobody").stdout == "nobody\nnobody\n"
    raises(AuthenticationException, lambda: commands.run("id", user="no-such-user"))


def background(commands):
    handle = commands.run("echo one; sleep 0.2; echo two >&2; exit 3", background=True)
    assert handle.pid in pids(commands)
    listed = next(process for process in commands.list() if process.pid == handle.pid)
    assert listed.cmd == "/bin/bash" and listed.args[:2] == ["-l", "-c"], listed
    failed = raises(CommandExitException, handle.wait)
    assert (failed.stdout, failed.stderr, failed.exit_code) == ("one\n", "two\n", 3), failed
    assert handle.pid not in pids(commands)
    # The pieces of the output, as they come.
    handle = commands.run("echo a; sleep 0.2; echo b >&2; sleep 0.2; echo c", background=True)
    pieces = list(handle)
    # How they are cut is a matter of how busy the machine is.
    assert "".join(out or "" for out, _, _ in pieces) == "a\nc\n", pieces
    assert "".join(err or "" for _, err, _ in pieces) == "b\n", pieces


def stdin(commands):
    handle = commands.run("read line; echo got $line; cat", background=True, stdin=True)
    commands.send_stdin(handle.pid, "hällo\n")
    commands.send_stdin(handle.pid, "rest")
    commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "got hällo\nrest"
    raises(NotFoundException, lambda: commands.send_stdin(handle.pid, "too late"))
    # Without it there is nothing to read.
    assert commands.run("cat").stdout == ""


def kill(commands):
    handle = commands.run("sleep 1000 & echo $!; wait", background=True)
    # The number must be there before what says it is killed.
    grandchild = next(iter(handle))[0].strip()
    assert grandchild.isdigit() and runs(grandchild), grandchild
    assert commands.kill(handle.pid) is True
    failed = raises(CommandExitException, handle.wait)
    assert failed.exit_code != 0 and "killed" in failed.error, failed
    assert commands.kill(handle.pid) is False
    until("all of it ends", lambda: not runs(grandchild))
    assert commands.run("sleep 1000", background=True).kill() is True


def runs(pid):
    # Collected by whoever adopts orphans here: what counts is that it runs no more.
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return ") Z " not in stat.read()
    except FileNotFoundError:
        return False


def connect(commands):
    handle = commands.run("read line; echo got $line; exit 5", background=True, stdin=True)
    handle.disconnect()
    again = commands.connect(handle.pid)
    assert again.pid == handle.pid
    commands.send_stdin(handle.pid, "x\n")
    failed = raises(CommandExitException, again.wait)
    assert (failed.stdout, failed.exit_code) == ("got x\n", 5), failed
    raises(NotFoundException, lambda: commands.connect(4_000_000))


def timeout(commands):
    began = time.monotonic()
    handle = commands.run("echo $$; sleep 1000", background=True, timeout=1)
    raises(TimeoutException, handle.wait)
    raises(TimeoutException, lambda: commands.run("sleep 1000", timeout=0.5))
    assert time.monotonic() - began < 20
    until("nothing runs", lambda: pids(commands) == [])
    assert commands.run("echo fine", timeout=0).stdout == "fine\n"


async def at_once():
    commands = (await AsyncSandbox.create()).commands
    results = await asyncio.gather(*(commands.run(f"echo {n}") for n in range(30)))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(30)], results
    seen = []
    handle = await commands.run("read x; echo $x", background=True, stdin=True, on_stdout=seen.append)
    assert handle.pid in [process.pid for process in await commands.list()]
    await commands.send_stdin(handle.pid, "hi\n")
    assert (await handle.wait()).stdout == "hi\n" and seen == ["hi\n"]


def main():
    commands = Sandbox.create().commands
    for check in (foreground, surroundings, background, stdin, kill, connect, timeout):
        check(commands)
        print(f"{check.__name__}: right")
    asyncio.run(at_once())
    print("at_once: right")


if __name__ == "__main__":
    main()
    # Now: with threads of the SDK's native client still at work, the interpreter's own end crashes once in a while (2.63.0).
    sys.stdout.flush()
    os._exit(0)
