"""What programs written for the older SDK, wrenn 0.1.2, do: its answers must be there at once, its terminals speak JSON."""

import time

from wrenn import Capsule, WrennClient, WrennConflictError, WrennError, WrennNotFoundError


def right(what, condition, seen=None):
    assert condition, f"{what}: {seen!r}"
    print(f"{what}: right", flush=True)


def fails(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def read_until(session, wanted):
    said = b""
    for event in session:
        said += event.data if event.type == "output" else b""
        if wanted in said:
            return said
        assert event.type not in ("exit", "error"), (event, said)
    raise AssertionError(said)


client = WrennClient()
capsule = Capsule(template="minimal", wait=True)
capsule_id = capsule.capsule_id
right("created", capsule.is_running() and capsule_id in [one.id for one in Capsule.list()])
capsule.ping()
capsule.wait_ready()

run = capsule.commands.run
ran = run("echo out; echo err >&2; exit 42")
right("command", (ran.stdout, ran.stderr, ran.exit_code) == ("out\n", "err\n", 42), ran)
right("root", run("id -un; cd; pwd").stdout == "root\n/root\n")
handle = run("echo begun; sleep 1; echo over; exit 7", background=True, tag="mine")
right("background", handle.pid > 0 and handle.tag == "mine", handle)
right("listed", handle.pid in [one.pid for one in capsule.commands.list()])
heard = list(capsule.commands.connect(handle.pid))
right("attached", heard[-1].exit_code == 7 and any(e.type == "stdout" and "over" in e.data for e in heard), heard)
sleeper = run("sleep 300", background=True)
capsule.commands.kill(sleeper.pid)
time.sleep(0.5)
right("killed", sleeper.pid not in [one.pid for one in capsule.commands.list()])
streamed = list(capsule.commands.stream("echo one; exit 5"))
right("stream", streamed[0].type == "start" and streamed[-1].exit_code == 5, streamed)

with capsule.pty(cols=100, rows=30) as term:
    term.write(b"echo $((40 + 2)); stty size\n")
    right("terminal", b"42" in read_until(term, b"30 100") and term.tag.startswith("pty-") and term.pid > 0)
    term.resize(cols=132, rows=50)
    term.write(b"stty size\n")
    read_until(term, b"50 132")
    with capsule.pty_connect(term.tag) as again:
        again.write(b"echo again-$((1 + 1))\n")
        read_until(again, b"again-2")
        again.write(b"exit 3\n")
        last = [event for event in again][-1]
        right("exit code of a shell", (last.type, last.exit_code) == ("exit", 3), last)
# Says something before anybody types.
with capsule.pty(cmd="/bin/sh", args=["-c", "echo first; sleep 1; echo second"]) as term:
    said = b"".join(event.data for event in term if event.type == "output")
    right("output before any input", b"first" in said and b"second" in said, said)

files = capsule.files
files.write("/tmp/a.bin", bytes([0, 1, 2, 255]))
right("bytes", files.read_bytes("/tmp/a.bin") == bytes([0, 1, 2, 255]))
files.write("/tmp/deep/er/b.txt", "b")
right("list", [entry.name for entry in files.list("/tmp/deep")] == ["er"])
right("depth", len(files.list("/tmp/deep", depth=2)) == 2)
right("exists", files.exists("/tmp/a.bin") and not files.exists("/tmp/none"))
right("directory", files.make_dir("/tmp/new/dir").path == "/tmp/new/dir")
right("directory again", files.make_dir("/tmp/new/dir").path == "/tmp/new/dir")
files.remove("/tmp/deep")
right("removed", not files.exists("/tmp/deep"))
fails(WrennNotFoundError, lambda: files.read("/tmp/none"))
content = bytes(range(256)) * 4_000
files.upload_stream("/tmp/large", (content[at : at + 65_536] for at in range(0, len(content), 65_536)))
right("streams", b"".join(files.download_stream("/tmp/large")) == content)

git = capsule.git
git.init("/root/repo")
git.configure_user("Ada", "ada@example.org")
files.write("/root/repo/a.txt", "a")
right("git status", [one.path for one in git.status(cwd="/root/repo").files] == ["a.txt"])
git.add(["."], cwd="/root/repo")
git.commit("first", cwd="/root/repo")
right("git branches", len(git.branches(cwd="/root/repo")) == 1)

run("echo kept >/dev/shm/kept")
right("paused", capsule.pause().status == "paused")
fails(WrennConflictError, lambda: run("true"))
right("resumed", capsule.resume().status == "running" and run("cat /dev/shm/kept").stdout == "kept\n")
template = capsule.create_snapshot(name="older-sdk", overwrite=True)
right("snapshot", (template.name, template.type) == ("older-sdk", "snapshot"), template)
right("snapshots", "older-sdk" in [one.name for one in client.snapshots.list(type="snapshot")])
with Capsule(template="older-sdk", wait=True) as begun:
    right("begun with it", begun.commands.run("cat /dev/shm/kept").stdout == "kept\n")
    begun_id = begun.capsule_id
right("destroyed with its block", client.capsules.get(begun_id).status in ("stopped", "missing"))
client.snapshots.delete("older-sdk")
right("snapshot deleted", "older-sdk" not in [one.name for one in client.snapshots.list()])
capsule.pause()
again = Capsule.connect(capsule_id)
right("connecting resumes", again.is_running())
Capsule.destroy(capsule_id)
right("destroyed", client.capsules.get(capsule_id).status in ("stopped", "missing"))
fails(WrennError, lambda: run("true"))
print("all of it is right", flush=True)
