//! What the same work costs without envd: a bare process, `cat` into a socket, a file copied over a plain connection.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::envd::PIECE;

pub fn run(program: &str) -> Result<()> {
    let status = Command::new(program).stdin(Stdio::null()).status().with_context(|| format!("run {program}"))?;
    ensure!(status.success(), "{program} ended with {status}");
    Ok(())
}

/// `cat` of the file straight into a socket that is read here: the number of bytes.
pub fn cat(file: &Path) -> Result<u64> {
    let (ours, theirs) = pair()?;
    let mut child = Command::new("cat")
        .arg(file)
        .stdin(Stdio::null())
        .stdout(OwnedFd::from(theirs))
        .spawn()
        .context("start cat")?;
    let count = drain(ours);
    ensure!(child.wait()?.success(), "cat failed");
    count
}

/// Bytes from here into a file, by another thread: as a network copy does it.
pub fn upload(file: &Path, length: u64) -> Result<()> {
    let (mut ours, theirs) = pair()?;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || copy(theirs, File::create(file)?));
        send(&mut ours, length)?;
        drop(ours);
        let count = receiver.join().expect("copying does not panic")?;
        ensure!(count == length, "the plain copy wrote {count} bytes");
        Ok(())
    })
}

/// A file by another thread to here.
pub fn download(file: &Path) -> Result<u64> {
    let (ours, theirs) = pair()?;
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || copy(File::open(file)?, theirs));
        let count = drain(ours)?;
        ensure!(sender.join().expect("copying does not panic")? == count, "the plain copy lost bytes");
        Ok(count)
    })
}

/// Not zeros, which a file system may leave out.
pub fn send(into: &mut impl Write, length: u64) -> Result<()> {
    let piece: Vec<u8> = (0..PIECE).map(|at| (at * 31 % 251) as u8).collect();
    let mut left = length;
    while left > 0 {
        let count = piece.len().min(usize::try_from(left).unwrap_or(PIECE));
        into.write_all(&piece[..count]).context("send a piece")?;
        left -= count as u64;
    }
    Ok(())
}

pub fn drain(from: impl Read) -> Result<u64> {
    copy(from, std::io::sink()).context("read what comes")
}

/// With system calls that read and write, as `nc` does, and none that leaves the bytes in the kernel.
fn copy(mut from: impl Read, mut into: impl Write) -> std::io::Result<u64> {
    let mut piece = vec![0; PIECE];
    let mut all = 0;
    loop {
        let count = from.read(&mut piece)?;
        if count == 0 {
            return Ok(all);
        }
        into.write_all(&piece[..count])?;
        all += count as u64;
    }
}

fn pair() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen")?;
    let ours = TcpStream::connect(listener.local_addr()?).context("connect")?;
    let (theirs, _) = listener.accept().context("accept")?;
    for stream in [&ours, &theirs] {
        stream.set_nodelay(true)?;
    }
    Ok((ours, theirs))
}
