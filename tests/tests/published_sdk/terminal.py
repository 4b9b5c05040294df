"""Terminals and processes in the background as programs written for the published SDKs use them. Runs on both generations."""

import sys
import time

from wrenn import Capsule

capsule = Capsule.connect(sys.argv[1])


def right(what, condition):
    assert condition, what
    print(f"{what}: right", flush=True)


def until(term, wanted):
    """Everything shown up to and with `wanted`."""
    shown = b""
    for event in term:
        if event.type == "output":
            shown += event.data
            if wanted in shown:
                return shown
        elif event.type in ("exit", "error"):
            break
    raise AssertionError(f"{wanted!r} is not in {shown!r}")


def rest(term):
    """What is shown up to the end, and the exit code."""
    shown = b""
    for event in term:
        if event.type == "output":
            shown += event.data
        elif event.type == "exit":
            return shown, event.exit_code
        elif event.type == "error":
            raise AssertionError(event)
    raise AssertionError(f"no exit after {shown!r}")


# Typed first.
with capsule.pty(cmd="/bin/sh", envs={"A": "b c"}, cwd="/tmp") as term:
    term.write(b"echo $((6*7))-$A-$PWD\n")
    until(term, b"42-b c-/tmp")
    right("started", term.tag.startswith("pty-") and term.pid > 0)
    term.resize(132, 41)
    term.write(b"stty size\n")
    right("resized", b"41 132" in until(term, b"41 132"))
    term.write(b"exit 3\n")
    right("ended", rest(term)[1] == 3)

# Read only: nothing is ever typed.
with capsule.pty(cmd="/bin/echo", args=["only", "read"]) as term:
    right("read", rest(term) == (b"only read\r\n", 0))

# Found again by its tag, with what it showed.
context = capsule.pty(cmd="/bin/sh")
term = context.__enter__()
term.write(b"echo be$((1))fore; sleep 600 &\n")
until(term, b"be1fore")
tag = term.tag
term._ws.close()
with capsule.pty_connect(tag) as again:
    right("shown again", b"be1fore" in until(again, b"be1fore"))
    again.write(b"echo af$((2))ter\n")
    until(again, b"af2ter")
    again.kill()
    right("killed", rest(again)[1] == -1)

# Killed in the same breath as it is left, as a session that is a context of its own does.
with capsule.pty(cmd="/bin/sleep", args=["4711"]) as term, term:
    for event in term:
        if event.type == "started":
            break
    pid = term.pid
for _ in range(50):
    if pid not in [process.pid for process in capsule.commands.list()]:
        break
    time.sleep(0.1)
right("left", pid not in [process.pid for process in capsule.commands.list()])

# In the background.
script = "echo one; echo two >&2; sleep 1; echo three; exit 5"
handle = capsule.commands.run(script, background=True, tag="from-sdk", envs={"A": "b"}, cwd="/tmp")
right("background", handle.pid > 0 and handle.tag == "from-sdk")
right("listed", (handle.pid, "from-sdk") in [(it.pid, it.tag) for it in capsule.commands.list()])
time.sleep(0.3)
events = list(capsule.commands.connect(handle.pid))
right("heard late", "".join(it.data for it in events if it.type == "stdout") == "one\nthree\n")
right("its end", events[-1].type == "exit" and events[-1].exit_code == 5)
right("heard after its end", list(capsule.commands.connect(handle.pid))[-1].type == "exit")
right("unknown", [it.type for it in capsule.commands.connect(999999)] in (["error"], []))
other = capsule.commands.run("sleep 600", background=True)
right("a tag of its own", other.tag.startswith("proc-"))
capsule.commands.kill(other.pid)
for _ in range(50):
    if other.pid not in [process.pid for process in capsule.commands.list()]:
        break
    time.sleep(0.1)
right("ended by its pid", other.pid not in [process.pid for process in capsule.commands.list()])
right("streamed", [it.type for it in capsule.commands.stream("echo a; exit 5")] == ["start", "stdout", "exit"])
