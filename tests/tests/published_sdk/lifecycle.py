"""The life of a sandbox as a program written for the published SDK goes through it."""

from wrenn import Capsule


def right(what, condition):
    assert condition, what
    print(f"{what}: right", flush=True)


capsule = Capsule(template="minimal", wait=True)
right("created", capsule.is_running())
ran = capsule.commands.run("echo out; echo err >&2; exit 3")
right("command", (ran.stdout, ran.stderr, ran.exit_code) == ("out\n", "err\n", 3))
capsule.files.write("/tmp/a.txt", "hello")
right("files", capsule.files.read("/tmp/a.txt") == "hello")
right("listed", capsule.capsule_id in [one.id for one in Capsule.list()])

capsule.commands.run("echo kept >/dev/shm/kept")
capsule.pause(wait=True)
right("paused", not capsule.is_running())
capsule.resume(wait=True)
right("resumed", capsule.is_running())
right("memory", capsule.commands.run("cat /dev/shm/kept").stdout == "kept\n")

again = Capsule.connect(capsule.capsule_id)
right("connected", again.commands.run("cat /tmp/a.txt").stdout == "hello")
with Capsule(template="minimal", wait=True) as other:
    right("another", other.commands.run("ls /tmp/a.txt").exit_code != 0)
capsule.destroy(wait=True)
right("destroyed", capsule.capsule_id not in [one.id for one in Capsule.list()])
