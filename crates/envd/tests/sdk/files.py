"""Files through the published Python SDK (e2b 2.45.1 and 2.63.0), which talks to one envd on this machine.

    envd --standalone --port 49983 &
    E2B_DEBUG=true E2B_API_KEY=e2b_00 python files.py

Exits with an error at the first thing that is not as it should be.
"""

import asyncio
import io
import os
import shutil
import sys
import tempfile

from e2b import (
    AsyncSandbox,
    FileNotFoundException,
    FilesystemEventType,
    FileType,
    InvalidArgumentException,
    Sandbox,
    SandboxException,
)

assert os.environ.get("E2B_DEBUG") == "true", "this script must not reach any real sandbox"

CREATE, WRITE, REMOVE = FilesystemEventType.CREATE, FilesystemEventType.WRITE, FilesystemEventType.REMOVE
RENAME, CHMOD = FilesystemEventType.RENAME, FilesystemEventType.CHMOD


def raises(kind, action):
    try:
        action()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def write_and_read(files, root):
    info = files.write(f"{root}/dir/f.txt", "Hello, wörld")
    assert (info.name, info.path, info.type) == ("f.txt", f"{root}/dir/f.txt", FileType.FILE), info
    assert info.metadata is None
    assert files.read(info.path) == "Hello, wörld"
    assert files.read(info.path, format="bytes") == "Hello, wörld".encode()
    assert files.read(info.path, gzip=True) == "Hello, wörld"
    files.write(info.path, "")
    assert files.read(info.path) == ""
    big = os.urandom(3_000_000)
    files.write(f"{root}/big", big)
    assert bytes(files.read(f"{root}/big", format="bytes")) == big
    with files.read(f"{root}/big", format="stream") as stream:
        assert b"".join(stream) == big
    files.write(f"{root}/zipped", big, gzip=True)
    assert bytes(files.read(f"{root}/zipped", format="bytes")) == big
    files.write(f"{root}/streamed", io.BytesIO(big))
    assert bytes(files.read(f"{root}/streamed", format="bytes")) == big
    names = ["plain", "with space", 'quote"s', "back\\slash", "percent%20", "ümläut", "semi;colon", "dir/below"]
    written = files.write_files([{"path": f"{root}/many/{name}", "data": name} for name in names])
    assert [info.path for info in written] == [f"{root}/many/{name}" for name in names], written
    for name in names:
        assert files.read(f"{root}/many/{name}") == name, name
    raises(FileNotFoundException, lambda: files.read(f"{root}/none"))
    raises(InvalidArgumentException, lambda: files.read(f"{root}/many"))
    raises(InvalidArgumentException, lambda: files.write(f"{root}/many", "a directory"))


def metadata(files, root):
    info = files.write(f"{root}/noted", "x", metadata={"Author": "me", "purpose": "a test"})
    expected = {"author": "me", "purpose": "a test"}
    assert info.metadata == expected, info
    assert files.get_info(info.path).metadata == expected
    assert [it.metadata for it in files.list(root) if it.name == "noted"] == [expected]
    assert files.rename(info.path, f"{root}/noted-2").metadata == expected
    files.write(f"{root}/noted-2", "x")
    assert files.get_info(f"{root}/noted-2").metadata is None


def directories(files, root):
    assert files.make_dir(f"{root}/a/b") is True
    assert files.make_dir(f"{root}/a/b") is False
    files.write(f"{root}/a/f", "12345")
    os.symlink("f", f"{root}/a/link")
    info = files.get_info(f"{root}/a/f")
    assert (info.type, info.size, info.mode, info.permissions) == (FileType.FILE, 5, 0o644, "-rw-r--r--"), info
    info = files.get_info(f"{root}/a/link")
    assert info.symlink_target == f"{root}/a/f" and info.permissions == "Lrwxrwxrwx", info
    info = files.get_info(f"{root}/a")
    assert (info.type, info.name, info.permissions) == (FileType.DIR, "a", "drwxr-xr-x"), info
    listed = files.list(f"{root}/a")
    assert [it.path for it in listed] == [f"{root}/a/{name}" for name in ("b", "f", "link")], listed
    assert {it.path for it in files.list(f"{root}", depth=2)} >= {f"{root}/a", f"{root}/a/b", f"{root}/a/f"}
    raises(FileNotFoundException, lambda: files.list(f"{root}/none"))
    raises(InvalidArgumentException, lambda: files.list(f"{root}/a/f"))
    assert files.exists(f"{root}/a/f") and files.exists(f"{root}/a") and not files.exists(f"{root}/none")
    moved = files.rename(f"{root}/a/f", f"{root}/c/g")
    assert moved.path == f"{root}/c/g" and not files.exists(f"{root}/a/f")
    raises(FileNotFoundException, lambda: files.rename(f"{root}/none", f"{root}/x"))
    files.remove(f"{root}/c")
    files.remove(f"{root}/c")
    assert not files.exists(f"{root}/c")
    for path in ("", "/", ".", "~"):
        raises(InvalidArgumentException, lambda path=path: files.remove(path))


def watch(files, root):
    files.make_dir(f"{root}/watched")
    handle = files.watch_dir(f"{root}/watched")

    def events():
        return [(event.type, event.name) for event in handle.get_new_events()]

    files.write(f"{root}/watched/f", "x")
    got = events()
    assert got == [(CREATE, "f"), (CHMOD, "f"), (WRITE, "f")], got
    files.rename(f"{root}/watched/f", f"{root}/watched/g")
    files.remove(f"{root}/watched/g")
    got = events()
    assert got == [(RENAME, "f"), (CREATE, "g"), (REMOVE, "g")], got
    handle.stop()
    raises(SandboxException, handle.get_new_events)
    handle = files.watch_dir(f"{root}/watched", recursive=True, include_entry=True)
    files.write(f"{root}/watched/deep/er/f", "12345")
    entries = {event.name: event.entry for event in handle.get_new_events() if event.type == WRITE}
    assert entries["deep/er/f"].size == 5 and entries["deep/er/f"].path == f"{root}/watched/deep/er/f", entries
    handle.stop()
    raises(FileNotFoundException, lambda: files.watch_dir(f"{root}/none"))
    raises(InvalidArgumentException, lambda: files.watch_dir(f"{root}/big"))


async def stream_watch(root):
    files = (await AsyncSandbox.create()).files
    await files.make_dir(f"{root}/async")
    seen, done = [], asyncio.Event()

    def on_event(event):
        seen.append((event.type, event.name))
        if len(seen) == 3:
            done.set()

    ended = asyncio.Event()
    handle = await files.watch_dir(f"{root}/async", on_event, on_exit=lambda _: ended.set(), timeout=0)
    await files.write(f"{root}/async/f", "x")
    await asyncio.wait_for(done.wait(), 10)
    assert seen == [(CREATE, "f"), (CHMOD, "f"), (WRITE, "f")], seen
    await handle.stop()
    assert await files.read(f"{root}/async/f") == "x"
    assert {it.name for it in await files.list(f"{root}/async")} == {"f"}


def main():
    files = Sandbox.create().files
    root = tempfile.mkdtemp(prefix="envd-sdk-")
    try:
        for check in (write_and_read, metadata, directories, watch):
            check(files, root)
            print(f"{check.__name__}: right")
        asyncio.run(stream_watch(root))
        print("stream_watch: right")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
    # Now: with threads of the SDK's native client still at work, the interpreter's own end crashes once in a while (2.63.0).
    sys.stdout.flush()
    os._exit(0)
