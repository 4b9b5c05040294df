//! `/files` and `filesystem.Filesystem` from outside: whole files or none, as the user who asks, whatever lies in the way.

mod guest;

use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use guest::{Envd, JSON, basic, until};
use http::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const OCTETS: (&str, &str) = ("content-type", "application/octet-stream");

fn url(path: &Path) -> String {
    let query =
        url::form_urlencoded::Serializer::new(String::new()).append_pair("path", path.to_str().unwrap()).finish();
    format!("/files?{query}")
}

async fn put(envd: &Envd, path: &Path, headers: &[(&str, &str)], body: impl Into<Bytes>) -> (StatusCode, Value) {
    let headers = [&[OCTETS], headers].concat();
    let (status, _, answer) = envd.exchange("POST", &url(path), &headers, body).await;
    (status, serde_json::from_slice(&answer).unwrap())
}

async fn get(envd: &Envd, path: &Path, headers: &[(&str, &str)]) -> (StatusCode, Bytes) {
    let (status, headers, body) = envd.exchange("GET", &url(path), headers, "").await;
    if status == 200 && !headers.contains_key("content-encoding") {
        assert_eq!(headers["content-length"].to_str().unwrap(), body.len().to_string());
    }
    (status, body)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_file_goes_in_and_comes_out() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let path = dir.path().join("a/b/näme \"x\"");
    let (status, written) = put(&envd, &path, &[], content.clone()).await;
    assert_eq!(status, 200);
    assert_eq!(written, json!([{"path": path.to_str().unwrap(), "name": "näme \"x\"", "type": "file"}]));
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
    assert!(get(&envd, &path, &[]).await == (StatusCode::OK, Bytes::from(content.clone())));
    let (status, part) = get(&envd, &path, &[("range", "bytes=100-199")]).await;
    assert_eq!((status.as_u16(), &part[..]), (206, &content[100..200]));
    assert_eq!(get(&envd, &path, &[("range", "bytes=3000000-")]).await.0, 416);
    // Replaced as a whole: mode kept, nothing left beside it.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o750)).unwrap();
    assert_eq!(put(&envd, &path, &[], "new").await.0, 200);
    assert_eq!(
        (std::fs::read(&path).unwrap(), std::fs::metadata(&path).unwrap().mode() & 0o7777),
        (b"new".to_vec(), 0o750)
    );
    assert_eq!(put(&envd, &path, &[], "").await.0, 200);
    assert_eq!(get(&envd, &path, &[]).await, (StatusCode::OK, Bytes::new()));
    assert_eq!(names(path.parent().unwrap()).len(), 1);
}

#[tokio::test]
async fn gzip_both_ways() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let path = dir.path().join("f");
    let plain = b"compress me ".repeat(100_000);
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(&plain).unwrap();
    let packed = packer.finish().unwrap();
    assert_eq!(put(&envd, &path, &[("content-encoding", "gzip")], packed.clone()).await.0, 200);
    assert!(std::fs::read(&path).unwrap() == plain);
    let (status, got) = get(&envd, &path, &[("accept-encoding", "gzip")]).await;
    let mut unpacked = Vec::new();
    flate2::read::GzDecoder::new(&got[..]).read_to_end(&mut unpacked).unwrap();
    assert!(status == 200 && unpacked == plain && got.len() < plain.len() / 10);
    assert!(get(&envd, &path, &[("accept-encoding", "gzip, deflate, br")]).await.1 == plain);
    assert_eq!(get(&envd, &path, &[("accept-encoding", "identity;q=0")]).await.0, 406);
    // A cut body leaves the old file.
    let cut = packed[..packed.len() / 2].to_vec();
    assert_eq!(put(&envd, &path, &[("content-encoding", "gzip")], cut).await.0, 400);
    assert_eq!(put(&envd, &path, &[("content-encoding", "br")], "x").await.0, 415);
    assert!(std::fs::read(&path).unwrap() == plain);
    until("the unfinished file is gone", async || names(dir.path()) == ["f"]).await;
}

#[tokio::test]
async fn forms_carry_several_files() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let kind = ("content-type", "multipart/form-data; boundary=X");
    let part = |name: &str, content: &str| {
        format!("--X\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n{content}\r\n")
    };
    let form = |parts: &[String]| format!("{}--X--\r\n", parts.concat());
    let two = form(&[part(&at("one"), "1"), part(&at("deep/two"), "22")]);
    let (status, _, body) = envd.exchange("POST", "/files", &[kind], two).await;
    let written: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((status.as_u16(), &written[1]["path"]), (200, &json!(at("deep/two"))));
    assert_eq!(
        (std::fs::read(at("one")).unwrap(), std::fs::read(at("deep/two")).unwrap()),
        (b"1".to_vec(), b"22".to_vec())
    );
    let named = form(&[part("ignored", "3")]);
    assert_eq!(envd.exchange("POST", &url(Path::new(&at("three"))), &[kind], named).await.0, 200);
    assert_eq!(std::fs::read(at("three")).unwrap(), b"3");
    for (name, body) in [
        ("same file twice", form(&[part(&at("one"), "x"), part(&at("one"), "y")])),
        ("no file", form(&[])),
        ("no file name", form(&[part("", "x")])),
        ("cut off", part(&at("cut"), "x")),
        ("the second cut off", part(&at("first"), "1") + &part(&at("cut"), "x")),
        ("the second broken", part(&at("first"), "1") + "--X\r\nno head\r\n\r\n--X--\r\n"),
        ("an endless head", format!("--X\r\nA: {}", "a".repeat(1 << 20))),
        ("an endless preamble", "a".repeat(1 << 20)),
        ("a million parts", format!("{}--X--", part("", "").replace("\"file\"", "\"x\"").repeat(2000))),
        ("no form", "hello".to_owned()),
        ("no boundary", String::new()),
    ] {
        let (status, _, body) = envd.exchange("POST", "/files", &[kind], body).await;
        assert_eq!(status, 400, "{name}: {body:?}");
    }
    assert_eq!(envd.exchange("POST", "/files?path=/x", &[("content-type", "text/plain")], "").await.0, 415);
    until("nothing unfinished is left", async || names(dir.path()) == ["deep", "one", "three"]).await;
    assert_eq!(std::fs::read(at("one")).unwrap(), b"1");
    for kind in ["multipart/form-data", "multipart/form-data; boundary="] {
        assert_eq!(envd.exchange("POST", "/files", &[("content-type", kind)], "").await.0, 400, "{kind}");
    }
}

#[tokio::test]
async fn a_form_that_unpacks_to_gigabytes_of_nothing_is_refused() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(b"--X\r\nContent-Disposition: ").unwrap();
    for _ in 0..256 {
        packer.write_all(&vec![b'a'; 1 << 20]).unwrap();
    }
    let headers = [("content-type", "multipart/form-data; boundary=X"), ("content-encoding", "gzip")];
    assert_eq!(envd.exchange("POST", "/files", &headers, packer.finish().unwrap()).await.0, 400);
    assert!(envd.resident_kib() < 24 * 1024, "{} KiB", envd.resident_kib());
    assert_eq!(names(dir.path()).len(), 0);
}

#[tokio::test]
async fn what_is_no_regular_file_is_refused_at_once() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("folder")).unwrap();
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("loop-b", at("loop-a")).unwrap();
    symlink("loop-a", at("loop-b")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    let long = at(&"x".repeat(256));
    for (path, read, write) in [
        (at("folder"), 400, 400),
        (at("folder/"), 400, 400),
        (at("fifo"), 400, 400),
        (at("socket"), 400, 400),
        (at("loop-a"), 400, 400),
        (long, 400, 400),
        (at("missing/"), 404, 400),
        ("/dev/zero".into(), 400, 200),
    ] {
        assert_eq!(get(&envd, &path, &[]).await.0, read, "read {}", path.display());
        assert_eq!(put(&envd, &path, &[], "x").await.0, write, "write {}", path.display());
    }
    assert_eq!(get(&envd, &at("missing"), &[]).await.0, 404);
    std::fs::write(at("file"), "").unwrap();
    assert_eq!(put(&envd, &at("file/below"), &[], "x").await.0, 400);
    std::fs::copy("/bin/sleep", at("running")).unwrap();
    let mut running = Command::new(at("running")).arg("60").spawn().unwrap();
    assert_eq!(put(&envd, &at("running"), &[], "x").await.0, 409);
    running.kill().unwrap();
    running.wait().unwrap();
    for query in ["/files", "/files?path=", "/files?path=%00"] {
        assert_eq!(envd.exchange("GET", query, &[], "").await.0, 400, "{query}");
        assert_eq!(envd.exchange("POST", query, &[OCTETS], "").await.0, 400, "{query}");
    }
}

#[tokio::test]
async fn links_are_written_through() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("target"), "old").unwrap();
    symlink("target", at("link")).unwrap();
    symlink("not-yet", at("dangling")).unwrap();
    std::fs::hard_link(at("target"), at("second-name")).unwrap();
    assert_eq!(put(&envd, &at("link"), &[], "through").await.0, 200);
    assert_eq!(std::fs::read(at("second-name")).unwrap(), b"through");
    assert_eq!(put(&envd, &at("dangling"), &[], "made").await.0, 200);
    assert_eq!(std::fs::read(at("not-yet")).unwrap(), b"made");
    for link in ["link", "dangling"] {
        assert!(std::fs::symlink_metadata(at(link)).unwrap().is_symlink(), "{link} is still a link");
    }
    assert_eq!(get(&envd, &at("link"), &[]).await, (StatusCode::OK, Bytes::from_static(b"through")));
}

/// Where a rename would lose something, or is not allowed.
#[tokio::test]
async fn what_cannot_be_replaced_is_overwritten() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name);
    let nobody = basic("nobody");
    let as_nobody = [("authorization", nobody.as_str())];
    let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
    mode(dir.path(), 0o755);
    // The file may be written, the directory not.
    std::fs::create_dir(at("closed")).unwrap();
    std::fs::create_dir(at("sticky")).unwrap();
    mode(&at("sticky"), 0o1777);
    for folder in ["closed", "sticky"] {
        let file = at(folder).join("f");
        std::fs::write(&file, "a longer old text").unwrap();
        mode(&file, 0o666);
        let before = inode(&file);
        assert_eq!(put(&envd, &file, &as_nobody, "new").await.0, 200, "{folder}");
        assert_eq!(std::fs::read(&file).unwrap(), b"new");
        assert_eq!((inode(&file), std::fs::metadata(&file).unwrap().uid()), (before, 0), "{folder}");
    }
    assert_eq!(put(&envd, &at("closed/new"), &as_nobody, "x").await.0, 403);
    // Somebody else's attributes.
    std::fs::write(at("noted"), "old").unwrap();
    rustix::fs::setxattr(at("noted"), "user.other", b"kept", rustix::fs::XattrFlags::empty()).unwrap();
    let before = inode(&at("noted"));
    assert_eq!(put(&envd, &at("noted"), &[], "new").await.0, 200);
    assert_eq!(inode(&at("noted")), before);
    // A mount point.
    for name in ["mounted", "source"] {
        std::fs::write(at(name), "old").unwrap();
    }
    let mounted = Command::new("mount").arg("--bind").arg(at("source")).arg(at("mounted")).status().unwrap();
    assert!(mounted.success(), "this test needs the right to mount");
    let written = put(&envd, &at("mounted"), &[], "new").await.0;
    let source = std::fs::read(at("source")).unwrap();
    assert!(Command::new("umount").arg(at("mounted")).status().unwrap().success());
    assert_eq!((written.as_u16(), source), (200, b"new".to_vec()));
    until("no hidden file is left", async || {
        names(dir.path()) == ["closed", "mounted", "noted", "source", "sticky"] && names(&at("sticky")) == ["f"]
    })
    .await;
}

#[tokio::test]
async fn what_is_noted_about_a_file_stays_with_it() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let path = dir.path().join("f");
    let stat = async || {
        let entry = envd.call("/filesystem.Filesystem/Stat", json!({"path": path})).await.unwrap();
        entry["entry"]["metadata"].clone()
    };
    let noted = [("X-Metadata-Author", "me"), ("x-metadata-Purpose", "a test")];
    let (status, written) = put(&envd, &path, &noted, "x").await;
    let expected = json!({"author": "me", "purpose": "a test"});
    assert_eq!((status.as_u16(), &written[0]["metadata"]), (200, &expected));
    assert_eq!(stat().await, expected);
    assert_eq!(put(&envd, &path, &[("x-metadata-other", "1")], "x").await.0, 200);
    assert_eq!(stat().await, json!({"other": "1"}));
    // Written in place it is the same.
    std::fs::hard_link(&path, dir.path().join("second")).unwrap();
    assert_eq!(put(&envd, &path, &[("x-metadata-third", "")], "x").await.0, 200);
    assert_eq!(stat().await, json!({"third": ""}));
    let (_, written) = put(&envd, &path, &[], "x").await;
    assert_eq!((stat().await, &written[0]["metadata"]), (Value::Null, &Value::Null));
    for (name, value) in [("x-metadata-", "x"), ("x-metadata-a", "x\ty"), ("x-metadata-b", "é")] {
        assert_eq!(put(&envd, &path, &[(name, value)], "new").await.0, 400, "{name}");
    }
    assert_eq!(put(&envd, &path, &[("x-metadata-a", &"x".repeat(5000))], "new").await.0, 400);
    assert_eq!(std::fs::read(&path).unwrap(), b"x");
    let durably = format!("{}&fsync=true", url(&path));
    assert_eq!(envd.exchange("POST", &durably, &[OCTETS], "on disk").await.0, 200);
    assert_eq!(std::fs::read(&path).unwrap(), b"on disk");
}

#[tokio::test]
async fn who_has_the_file_is_told_so() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let path = dir.path().join("f");
    std::fs::write(&path, "0123456789").unwrap();
    let ask = async |headers: &[(&str, &str)]| envd.exchange("GET", &url(&path), headers, "").await;
    let mut told = ask(&[]).await.1;
    // The tag of a file that was just written is a weak one.
    until("the file has settled", async || {
        told = ask(&[]).await.1;
        !told["etag"].to_str().unwrap().starts_with("W/")
    })
    .await;
    let (tag, modified) = (told["etag"].to_str().unwrap(), told["last-modified"].to_str().unwrap());
    for condition in [("if-none-match", tag), ("if-modified-since", modified)] {
        let (status, headers, body) = ask(&[condition]).await;
        assert_eq!((status.as_u16(), body.len(), headers["etag"].to_str().unwrap()), (304, 0, tag), "{condition:?}");
    }
    for (condition, status) in
        [(("if-match", "\"x\""), 412), (("if-none-match", "\"x\""), 200), (("if-match", tag), 200)]
    {
        assert_eq!(ask(&[condition]).await.0, status, "{condition:?}");
    }
    let range = ("range", "bytes=2-4");
    for (condition, status, body) in [
        (tag, 206, "234"),
        (modified, 206, "234"),
        ("\"x\"", 200, "0123456789"),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 200, "0123456789"),
    ] {
        let answer = ask(&[range, ("if-range", condition)]).await;
        assert_eq!((answer.0.as_u16(), &answer.2[..]), (status, body.as_bytes()), "{condition}");
    }
    let packed = ask(&[("accept-encoding", "gzip")]).await.1;
    assert_ne!(packed["etag"], told["etag"]);
    std::fs::write(&path, "9876543210").unwrap();
    assert_eq!(ask(&[("if-none-match", tag)]).await.0, 200);
}

#[tokio::test]
async fn files_of_the_kernel_are_read_within_a_bound() {
    let envd = Envd::start();
    for path in ["/proc/cpuinfo", "/sys/kernel/mm/transparent_hugepage/enabled", "/proc/sys/kernel/ostype"] {
        if let Ok(content) = std::fs::read(path) {
            let (status, body) = get(&envd, Path::new(path), &[("range", "bytes=0-3")]).await;
            assert_eq!(status, 200, "{path}");
            assert!(body.len() == content.len() && !body.is_empty(), "{path}: {} bytes", body.len());
        }
    }
    for magic in ["/proc/self/root/etc/passwd", "/proc/self/fd/0", "/proc/self/exe"] {
        assert_eq!(get(&envd, Path::new(magic), &[]).await.0, 400, "{magic}");
    }
}

/// `dir` is now the user's own directory, now a link to one of root's, while he reads, writes, lists and removes in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_swapped_link_opens_nothing() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name);
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for (name, owner, mode) in [("his", 65534, 0o755), ("roots", 0, 0o700)] {
        std::fs::create_dir(at(name)).unwrap();
        std::fs::write(at(name).join("f"), if name == "his" { "open" } else { "secret" }).unwrap();
        std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(mode)).unwrap();
        for path in [at(name), at(name).join("f")] {
            std::os::unix::fs::chown(path, Some(owner), Some(owner)).unwrap();
        }
    }
    std::fs::create_dir(at("swap")).unwrap();
    symlink(at("his"), at("swap/dir")).unwrap();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let swapper = std::thread::spawn({
        let (stop, swap, his, roots) = (stop.clone(), at("swap"), at("his"), at("roots"));
        move || {
            let mut swaps = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for target in [&roots, &his] {
                    symlink(target, swap.join("next")).unwrap();
                    std::fs::rename(swap.join("next"), swap.join("dir")).unwrap();
                    swaps += 1;
                }
            }
            swaps
        }
    });
    let nobody = basic("nobody");
    let as_nobody = [("authorization", nobody.as_str())];
    let headers = [&JSON[..], &as_nobody].concat();
    let (mut seen, end) =
        (std::collections::BTreeSet::new(), std::time::Instant::now() + std::time::Duration::from_secs(2));
    while std::time::Instant::now() < end {
        let (status, body) = get(&envd, &at("swap/dir/f"), &as_nobody).await;
        assert!(status != 200 || body != "secret");
        seen.insert(("get", status.as_u16()));
        seen.insert(("put", put(&envd, &at("swap/dir/f"), &as_nobody, "his own").await.0.as_u16()));
        for (method, message) in [
            ("ListDir", json!({"path": at("swap/dir"), "depth": 2})),
            ("Remove", json!({"path": at("swap/dir/f")})),
            ("Move", json!({"source": at("swap/dir/f"), "destination": at("swap/dir/g")})),
            ("MakeDir", json!({"path": at("swap/dir/made")})),
        ] {
            let answer =
                envd.exchange("POST", &format!("/filesystem.Filesystem/{method}"), &headers, message.to_string()).await;
            seen.insert((method, answer.0.as_u16()));
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let swaps = swapper.join().unwrap();
    assert!(swaps > 1000, "{swaps} swaps only");
    assert!(seen.contains(&("get", 403)) && seen.contains(&("put", 200)) && seen.contains(&("put", 403)), "{seen:?}");
    assert!(seen.iter().all(|(_, status)| *status < 500), "{seen:?}");
    assert_eq!(names(&at("roots")), ["f"]);
    assert_eq!(std::fs::read(at("roots/f")).unwrap(), b"secret");
}

#[tokio::test]
async fn files_are_the_users_and_only_what_he_may() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let at = |name: &str| dir.path().join(name);
    let nobody = basic("nobody");
    let as_nobody = [("authorization", nobody.as_str())];
    assert_eq!(put(&envd, &at("a/his"), &as_nobody, "x").await.0, 200);
    for path in [at("a"), at("a/his")] {
        assert_eq!(std::fs::metadata(path).unwrap().uid(), 65534);
    }
    std::fs::write(at("roots"), "secret").unwrap();
    std::fs::set_permissions(at("roots"), std::fs::Permissions::from_mode(0o600)).unwrap();
    symlink("roots", at("way-round")).unwrap();
    for path in [at("roots"), at("way-round"), "/etc/shadow".into()] {
        assert_eq!(get(&envd, &path, &as_nobody).await.0, 403, "{}", path.display());
        assert_eq!(put(&envd, &path, &as_nobody, "mine").await.0, 403, "{}", path.display());
    }
    assert_eq!(put(&envd, Path::new("/root/x"), &as_nobody, "mine").await.0, 403);
    assert_eq!(std::fs::read(at("roots")).unwrap(), b"secret");
    let unknown = basic("nosuchuser");
    assert_eq!(put(&envd, &at("x"), &[("authorization", &unknown)], "x").await.0, 401);
    assert!(!at("x").exists());
}

#[tokio::test]
async fn a_full_disk_is_told_and_leaves_the_old_file() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(dir.path()).status().unwrap();
    assert!(mounted.success(), "this test needs the right to mount");
    let done = std::panic::AssertUnwindSafe(async {
        let path = dir.path().join("f");
        assert_eq!(put(&envd, &path, &[], "old").await.0, 200);
        let (status, fault) = put(&envd, &path, &[], vec![7; 3 << 20]).await;
        assert_eq!((status.as_u16(), &fault["message"]), (507, &json!("not enough disk space")));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        until("the unfinished file is gone", async || names(dir.path()) == ["f"]).await;
    });
    let result = futures::FutureExt::catch_unwind(done).await;
    assert!(Command::new("umount").arg(dir.path()).status().unwrap().success());
    result.unwrap();
}

#[tokio::test]
async fn an_upload_that_is_cut_off_leaves_nothing() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let path = dir.path().join("f");
    std::fs::write(&path, "old").unwrap();
    let mut stream = TcpStream::connect(envd.address()).await.unwrap();
    let head = format!(
        "POST {} HTTP/1.1\r\nhost: x\r\ncontent-type: {}\r\ncontent-length: 1000000\r\n\r\n",
        url(&path),
        OCTETS.1
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&[1; 500_000]).await.unwrap();
    until("it has begun", async || names(dir.path()).len() == 2).await;
    drop(stream);
    until("the unfinished file is gone", async || names(dir.path()) == ["f"]).await;
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
}

/// As Node's client does: it reads no answer before it has written all, and the connection is good for more.
#[tokio::test]
async fn a_refused_upload_is_answered_all_the_same() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let mut stream = TcpStream::connect(envd.address()).await.unwrap();
    let head = format!(
        "POST {} HTTP/1.1\r\nhost: x\r\ncontent-type: {}\r\ncontent-length: 16000000\r\n\r\n",
        url(dir.path()),
        OCTETS.1
    );
    for _ in 0..2 {
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&vec![1; 16_000_000]).await.unwrap();
        let mut answer = [0; 1000];
        let length = stream.read(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer[..length]);
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("is a directory"), "{answer}");
    }
    assert!(envd.resident_kib() < 24 * 1024, "{} KiB", envd.resident_kib());
}

#[tokio::test]
async fn a_download_that_nobody_reads_does_not_fill_memory() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let path = dir.path().join("sparse");
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let mut stream = TcpStream::connect(envd.address()).await.unwrap();
    stream.write_all(format!("GET {} HTTP/1.1\r\nhost: x\r\n\r\n", url(&path)).as_bytes()).await.unwrap();
    let mut read = vec![0; 4 << 20];
    stream.read_exact(&mut read).await.unwrap();
    assert!(String::from_utf8_lossy(&read[..500]).contains("content-length: 1099511627776"));
    assert!(envd.resident_kib() < 24 * 1024, "{} KiB", envd.resident_kib());
}

#[tokio::test]
async fn directories_by_call() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let call =
        async |method: &str, message: Value| envd.call(&format!("/filesystem.Filesystem/{method}"), message).await;
    let err = |code: &str| Err(code.to_owned());
    let made = call("MakeDir", json!({"path": at("a/b")})).await.unwrap();
    assert_eq!(
        (&made["entry"]["type"], &made["entry"]["permissions"]),
        (&json!("FILE_TYPE_DIRECTORY"), &json!("drwxr-xr-x"))
    );
    assert_eq!(call("MakeDir", json!({"path": at("a/b")})).await, err("already_exists"));
    std::fs::write(at("a/file"), "12345").unwrap();
    assert_eq!(call("MakeDir", json!({"path": at("a/file")})).await, err("invalid_argument"));
    let entry = &call("Stat", json!({"path": at("a/file")})).await.unwrap()["entry"];
    assert_eq!((&entry["size"], &entry["owner"], &entry["name"]), (&json!("5"), &json!("root"), &json!("file")));
    assert_eq!(call("Stat", json!({"path": at("none")})).await, err("not_found"));
    symlink(at("a"), at("link")).unwrap();
    let listed = call("ListDir", json!({"path": at("link"), "depth": 2})).await.unwrap();
    let paths: Vec<_> = listed["entries"].as_array().unwrap().iter().map(|it| it["path"].as_str().unwrap()).collect();
    assert_eq!(paths, [at("link/b"), at("link/file")]);
    assert_eq!(call("ListDir", json!({"path": at("a/file")})).await, err("invalid_argument"));
    assert_eq!(call("ListDir", json!({"path": at("none")})).await, err("not_found"));
    let moved = call("Move", json!({"source": at("a/file"), "destination": at("new/place")})).await.unwrap();
    assert_eq!(moved["entry"]["path"], at("new/place"));
    assert_eq!(call("Move", json!({"source": at("a/file"), "destination": at("x")})).await, err("not_found"));
    assert_eq!(call("Move", json!({"source": at("a"), "destination": at("new")})).await, err("failed_precondition"));
    for _ in 0..2 {
        call("Remove", json!({"path": at("new")})).await.unwrap();
    }
    call("Remove", json!({"path": at("link")})).await.unwrap();
    assert!(Path::new(&at("a/b")).exists() && !Path::new(&at("new")).exists());
    assert_eq!(call("Remove", json!({"path": ""})).await, err("invalid_argument"));
}

/// `/tmp` of a sandbox is memory: what is moved from there is copied.
#[tokio::test]
async fn moves_cross_file_systems() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    let (memory, disk) = (dir.path().join("memory"), dir.path().join("disk"));
    std::fs::create_dir(&memory).unwrap();
    std::fs::create_dir(&disk).unwrap();
    assert!(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&memory).status().unwrap().success());
    let done = std::panic::AssertUnwindSafe(async {
        let call = async |source: &Path, destination: &Path| {
            let message = json!({"source": source, "destination": destination});
            envd.call("/filesystem.Filesystem/Move", message).await.map(|answer| answer["entry"]["path"].clone())
        };
        std::fs::create_dir_all(memory.join("tree/sub")).unwrap();
        std::fs::write(memory.join("tree/sub/f"), "content").unwrap();
        symlink("sub/f", memory.join("tree/link")).unwrap();
        let moved = call(&memory.join("tree"), &disk.join("new/tree")).await;
        assert_eq!(moved, Ok(json!(disk.join("new/tree"))));
        assert_eq!(std::fs::read(disk.join("new/tree/link")).unwrap(), b"content");
        assert_eq!((names(&memory), names(&disk.join("new"))), (vec![], vec!["tree".to_owned()]));
        std::fs::write(memory.join("f"), "old").unwrap();
        assert!(call(&disk.join("new/tree/sub/f"), &memory.join("f")).await.is_ok());
        assert_eq!(std::fs::read(memory.join("f")).unwrap(), b"content");
        // Nothing has moved when not all can.
        nix::unistd::mkfifo(&disk.join("new/tree/sub/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(call(&disk.join("new"), &memory.join("new")).await, Err("failed_precondition".to_owned()));
        assert_eq!((names(&memory), names(&disk)), (vec!["f".to_owned()], vec!["new".to_owned()]));
    });
    let result = futures::FutureExt::catch_unwind(done).await;
    assert!(Command::new("umount").arg(&memory).status().unwrap().success());
    result.unwrap();
}

#[tokio::test]
async fn listings_show_clean_paths_and_nothing_of_ours() {
    let (envd, dir) = (Envd::start(), tempfile::tempdir().unwrap());
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    for name in ["sub/.envd-upload-new-0123456789abcdef", "sub/.envd-other", "sub/f"] {
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    for path in ["./sub/../sub/.", "sub//", "sub"] {
        let path = format!("{}/{path}", dir.path().display());
        let listed = envd.call("/filesystem.Filesystem/ListDir", json!({"path": path})).await.unwrap();
        let paths: Vec<_> = listed["entries"].as_array().unwrap().iter().map(|it| it["path"].clone()).collect();
        let expected = [".envd-other", "f"].map(|name| json!(dir.path().join("sub").join(name)));
        assert_eq!(paths, expected, "{path}");
    }
    let home = envd.call("/filesystem.Filesystem/Stat", json!({"path": "."})).await.unwrap();
    assert_eq!(home["entry"]["path"], "/root");
}

/// As a user who could not do harm if the refusal were missing.
#[tokio::test]
async fn roots_and_homes_are_not_removed() {
    let envd = Envd::start();
    let nobody = basic("nobody");
    let headers = [&JSON[..], &[("authorization", nobody.as_str())]].concat();
    for path in ["/", "//", "/tmp/..", "/.", ".", "~", "./", "x/..", ""] {
        let (status, _, body) =
            envd.exchange("POST", "/filesystem.Filesystem/Remove", &headers, json!({"path": path}).to_string()).await;
        let fault: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((status.as_u16(), &fault["code"]), (400, &json!("invalid_argument")), "{path}");
    }
}
