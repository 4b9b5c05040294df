"""What programs written for the SDK wrenn 0.3.0 do, each part of it once, against the whole platform."""

import asyncio
import threading
import time

from wrenn import (
    AsyncCapsule,
    Capsule,
    GitCommandError,
    PtyEventType,
    WrennClient,
    WrennConflictError,
    WrennError,
    WrennNotFoundError,
    WrennValidationError,
)


def right(what, condition, seen=None):
    assert condition, f"{what}: {seen!r}"
    print(f"{what}: right", flush=True)


def wait_for(what, condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.2)
    print(f"{what}: right", flush=True)


def fails(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


class Listener:
    """Hears the team's events from now on."""

    def __init__(self, client):
        self.events, self.is_open = [], threading.Event()
        threading.Thread(target=self._listen, args=(client,), daemon=True).start()
        assert self.is_open.wait(5), "the stream of events does not open"

    def _listen(self, client):
        for event in client.events.stream():
            self.events.append(event)
            self.is_open.set()

    def of(self, kind, resource):
        return [one for one in self.events if one.event == kind and one.resource and one.resource.id == resource]


def read_until(session, wanted, seconds=30):
    """What the terminal says up to these bytes."""
    said, end = b"", time.monotonic() + seconds
    for event in session:
        if event.type == PtyEventType.output:
            said += event.data
        assert time.monotonic() < end, said
        if wanted in said:
            return said
        assert event.type not in (PtyEventType.exit, PtyEventType.error), (event, said)
    raise AssertionError(said)


client = WrennClient()
listener = Listener(client)
right("connected to events", listener.events[0].event == "connected", listener.events[0])

# Lifecycle, with the defaults of a program that says nothing.
capsule = Capsule(wait=True)
capsule_id = capsule.capsule_id
right("created", capsule.is_running() and capsule.get_info().id == capsule_id)
wait_for("event of the create", lambda: listener.of("capsule.create", capsule_id), 15)
created = listener.of("capsule.create", capsule_id)[0]
right("its outcome", (created.outcome, created.actor.type, created.sandbox.id) == ("success", "api_key", capsule_id), created)
right("listed", capsule_id in [one.id for one in Capsule.list()])
capsule.ping()
capsule.wait_ready()

# Commands.
run = capsule.commands.run
ran = run("echo out; echo err >&2; exit 42")
right("command", (ran.stdout, ran.stderr, ran.exit_code) == ("out\n", "err\n", 42), ran)
right("lines", len(run("echo -e 'a\\nb\\nc'").stdout.strip().splitlines()) == 3)
right("duration", run("sleep 1").duration_ms >= 900)
right("working directory", run("pwd", cwd="/tmp").stdout == "/tmp\n")
right("home", run("pwd; echo $HOME; id -un").stdout == "/home/wrenn-user\n/home/wrenn-user\nwrenn-user\n")
environment = run("printf '%s' \"$A\"", envs={"A": "it's \"$x\" \\ ä"})
right("environment", environment.stdout == "it's \"$x\" \\ ä", environment)
right("no leak", run("echo ${A:-none}").stdout == "none\n")
right("PATH", "/usr/bin" in run("echo $PATH").stdout)
right("sudo", run("sudo -n id -un; sudo -n touch /opt/x && sudo -n head -c1 /etc/shadow >/dev/null && echo ok").stdout == "root\nok\n")
fails(WrennError, lambda: run("pwd", cwd="/no/such/place"))
fails(WrennError, lambda: run("sleep 20", timeout=2))
right("raw bytes", capsule.commands.run("printf '\\377\\376'").stdout != "")

# Background processes, and their streams.
begun = time.monotonic()
handle = run("for n in 1 2 3 4 5; do echo tick $n; sleep 0.5; done; exit 7", background=True, tag="ticker")
right("background", handle.pid > 0 and handle.tag == "ticker" and time.monotonic() - begun < 10, handle)
right("its process", [one.tag for one in capsule.commands.list() if one.pid == handle.pid] == ["ticker"])
heard = list(capsule.commands.connect(handle.pid))
right("attached", heard[-1].type == "exit" and heard[-1].exit_code == 7, heard)
right("what it said", any("tick 5" in event.data for event in heard if event.type == "stdout"), heard)
list(capsule.commands.connect(handle.pid))
list(capsule.commands.connect(4_000_000))
sleeper = run("sleep 300", background=True)
right("tag of its own", sleeper.tag.startswith("proc-"), sleeper.tag)
capsule.commands.kill(sleeper.pid)
wait_for("killed process is gone", lambda: sleeper.pid not in [one.pid for one in capsule.commands.list()], 5)
fails(WrennNotFoundError, lambda: capsule.commands.kill(4_000_000))
streamed = list(capsule.commands.stream("echo one; echo two >&2; exit 5"))
right("stream", [streamed[0].type, streamed[-1].exit_code] == ["start", 5], streamed)
right("both channels", {event.type for event in streamed} == {"start", "stdout", "stderr", "exit"}, streamed)
right("stream of a program", "".join(e.data for e in capsule.commands.stream("/bin/echo", ["a b"]) if e.type == "stdout") == "a b\n")

# Terminals. This one is left alone until the server has asked whether anybody is there.
with capsule.pty() as idle:
    started = next(idle)
    right("terminal", started.type == PtyEventType.started and idle.tag.startswith("pty-") and idle.pid > 0, started)
    idle_since = time.monotonic()
    with capsule.pty(cols=100, rows=30, cwd="/tmp", envs={"GREETING": "hello"}) as term:
        term.write(b"echo $((40 + 2)) $GREETING; pwd; stty size\n")
        said = read_until(term, b"30 100")
        right("its words", b"42 hello" in said and b"/tmp" in said, said)
        term.resize(cols=132, rows=50)
        term.write(b"stty size\n")
        read_until(term, b"50 132")
        term.write(b"printf 'kept-%s\\n' $((1 + 1))\n")
        read_until(term, b"kept-2")
        with capsule.pty_connect(term.tag) as again:
            read_until(again, b"kept-2")
            again.write(b"exit 3\n")
            last = [event for event in again][-1]
            right("exit code of a shell", (last.type, last.exit_code) == (PtyEventType.exit, 3), last)
    with capsule.pty(cmd="/bin/echo", args=["by argv"]) as term:
        said = b"".join(event.data for event in term if event.type == PtyEventType.output)
        right("arguments", b"by argv" in said, said)

    # Files.
    files = capsule.files
    files.write("/tmp/a.txt", "hellö")
    right("text", files.read("/tmp/a.txt") == "hellö")
    files.write("/tmp/a.bin", bytes([0, 1, 2, 255]))
    right("bytes", files.read_bytes("/tmp/a.bin") == bytes([0, 1, 2, 255]))
    files.write("/tmp/deep/er/b.txt", "b")
    files.write("/tmp/deep/er/b.txt", "other")
    right("parents and again", files.read("/tmp/deep/er/b.txt") == "other")
    one, two = files.list("/tmp/deep"), files.list("/tmp/deep", depth=2)
    right("list", [entry.name for entry in one] == ["er"] and one[0].type == "directory", one)
    right("depth", [entry.path for entry in two] == ["/tmp/deep/er", "/tmp/deep/er/b.txt"], two)
    right("exists", files.exists("/tmp/a.txt") and not files.exists("/tmp/none"))
    right("missing parent", not files.exists("/tmp/none/at/all"))
    right("directory", files.make_dir("/tmp/new/dir").path == "/tmp/new/dir")
    right("directory again", files.make_dir("/tmp/new/dir").type == "directory")
    files.remove("/tmp/a.txt")
    files.remove("/tmp/deep")
    right("removed", not files.exists("/tmp/a.txt") and not files.exists("/tmp/deep"))
    for call in (files.read, files.list, files.remove):
        fails(WrennNotFoundError, lambda: call("/tmp/none"))
    fails(WrennValidationError, lambda: files.remove("/"))
    content = bytes(range(256)) * 40_000
    files.upload_stream("/tmp/large", (content[at : at + 65_536] for at in range(0, len(content), 65_536)))
    right("streams", b"".join(files.download_stream("/tmp/large")) == content)

    # Git, by the real program in the sandbox.
    git = capsule.git
    repo = "/home/wrenn-user/repo"
    git.init("repo")
    git.configure_user("Ada", "ada@example.org")
    files.write("repo/a.txt", "a")
    status = git.status(cwd=repo)
    right("git status", [one.path for one in status.files] == ["a.txt"], status)
    git.add(["."], cwd=repo)
    git.commit("first", cwd=repo)
    git.create_branch("other", cwd=repo)
    right("git branches", "other" in [branch.name for branch in git.branches(cwd=repo)])
    fails(GitCommandError, lambda: git.status(cwd="/tmp"))

    # Deadlines, pages and numbers.
    right("stats", client.capsules.stats().current.running_count >= 1)
    right("stats of a day", client.capsules.stats(range="24h").peaks is not None)
    right("usage", client.capsules.usage().points is not None)
    wait_for("metrics", lambda: client.capsules.metrics(capsule_id).points, 20)
    right("metrics of two hours", client.capsules.metrics(capsule_id, range="2h").points is not None)
    fails(WrennValidationError, lambda: client.capsules.metrics(capsule_id, range="1y"))

    # Memory is kept by a pause, and by a snapshot.
    run("echo kept >/dev/shm/kept")
    time.sleep(max(0, 31 - (time.monotonic() - idle_since)))
    idle.write(b"echo still-$((1 + 1))\n")
    kinds, said = set(), b""
    while b"still-2" not in said:
        event = next(idle)
        kinds.add(event.type)
        # What came in the other generation's frames while nobody read is without its data, and comes again.
        said += (event.data or b"") if event.type == PtyEventType.output else b""
    right("what was said while nobody read", b"$ " in said.split(b"echo")[0], said)
    right("terminal after a ping", PtyEventType.ping in kinds, kinds)

capsule.pause(wait=True)
right("paused", capsule.get_info().status == "paused")
fails(WrennConflictError, lambda: run("true"))
capsule.resume(wait=True)
right("resumed", capsule.is_running() and run("cat /dev/shm/kept").stdout == "kept\n")
again = Capsule.connect(capsule_id)
right("connected", again.commands.run("cat /tmp/a.bin | wc -c").stdout.strip() == "4")
template = capsule.create_snapshot(name="sdk-snapshot")
wait_for("snapshot", lambda: "sdk-snapshot" in [one.name for one in client.snapshots.list(type="snapshot")])
right("still runs", capsule.is_running(), template)
with Capsule(template="sdk-snapshot", wait=True) as begun:
    right("begun with it", begun.commands.run("cat /dev/shm/kept").stdout == "kept\n")
    # With what the snapshot had running; the other one has its own.
    begun.files.write("/tmp/own", "x")
    right("apart", not capsule.files.exists("/tmp/own"))
    begun_id = begun.capsule_id
wait_for("destroyed with its block", lambda: client.capsules.get(begun_id).status in ("stopped", "missing"))
client.snapshots.delete("sdk-snapshot")
right("snapshot deleted", "sdk-snapshot" not in [one.name for one in client.snapshots.list()])
right("base templates", "minimal" in [one.name for one in client.snapshots.list(type="base")])
capsule.pause(wait=True)
capsule.destroy(wait=True)
right("destroyed", capsule_id not in [one.id for one in Capsule.list()])
fails(WrennNotFoundError, lambda: client.capsules.metrics(capsule_id))
for kind in ("capsule.pause", "capsule.resume", "capsule.destroy"):
    wait_for(f"event {kind}", lambda: listener.of(kind, capsule_id), 15)
states = [event.metadata["to"] for event in listener.of("capsule.state.changed", capsule_id)]
right("states told", states[-1] == "stopped" and "paused" in states and "running" in states, states)
wait_for("events of the snapshot", lambda: {e.event for e in listener.events} >= {"template.snapshot.create", "template.snapshot.delete"}, 15)


async def twins():
    """The same by the twins of the calls for asyncio."""
    async with await AsyncCapsule.create(template="minimal", wait=True) as capsule:
        ran = await capsule.commands.run("id -un")
        right("async command", ran.stdout == "root\n", ran)
        await capsule.files.write("/tmp/a", "a")
        right("async file", await capsule.files.read("/tmp/a") == "a")
        events = [event async for event in capsule.commands.stream("echo hi")]
        right("async stream", events[-1].exit_code == 0, events)
        async with capsule.pty() as term:
            await term.write(b"echo $((6 * 7)); exit 0\n")
            said = b""
            async for event in term:
                said += event.data if event.type == PtyEventType.output else b""
            right("async terminal", b"42" in said, said)


asyncio.run(twins())
print("all of it is right", flush=True)
