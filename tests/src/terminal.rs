//! A program in a pseudo-terminal, as a person has it before them: what it shows, what is typed, the size, how the terminal is set.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};

const LOOK_EVERY: Duration = Duration::from_millis(20);

pub struct Terminal {
    master: File,
    /// Held open, so that the terminal can be looked at after the program's end.
    slave: OwnedFd,
    child: Child,
    shown: Arc<Mutex<Vec<u8>>>,
}

fn window(cols: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Terminal {
    pub fn run(mut command: Command, cols: u16, rows: u16) -> Self {
        let pair = openpty(Some(&window(cols, rows)), None).expect("a pseudo-terminal");
        let end = || Stdio::from(pair.slave.try_clone().expect("another descriptor"));
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: between fork and exec only two system calls are made, which are safe to call there.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                // Of this session from now on, so that a change of its size is told by a signal.
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let child = command.spawn().expect("the program can be started");
        let master = File::from(pair.master);
        let shown = Arc::new(Mutex::new(Vec::new()));
        let (mut reading, kept) = (master.try_clone().expect("another descriptor"), shown.clone());
        // Ends with the terminal.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reading.read(&mut buffer) {
                kept.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        Self { master, slave: pair.slave, child, shown }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned()
    }

    /// What was shown so far is waited for no more.
    #[allow(dead_code, reason = "also a part of the tests of the command line alone, which do not need it")]
    pub fn forget(&self) {
        self.shown.lock().unwrap().clear();
    }

    pub fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("the terminal takes what is typed");
    }

    pub fn wait_for(&self, text: &str, limit: Duration) {
        let began = Instant::now();
        while !self.shown().contains(text) {
            assert!(began.elapsed() < limit, "{text:?} was not shown within {limit:?}, but {:?}", self.shown());
            std::thread::sleep(LOOK_EVERY);
        }
    }

    pub fn resize(&self, cols: u16, rows: u16) {
        // SAFETY: the descriptor is open, and the argument is what this call takes.
        let answer = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &window(cols, rows)) };
        assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
    }

    pub fn settings(&self) -> Termios {
        tcgetattr(&self.slave).expect("the terminal says how it is set")
    }

    /// Keys go to the program one by one, and are not shown by the terminal itself.
    pub fn is_raw(&self) -> bool {
        !self.settings().local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }

    pub fn wait_raw(&self, limit: Duration) {
        let began = Instant::now();
        while !self.is_raw() {
            assert!(began.elapsed() < limit, "the terminal is not raw; shown: {:?}", self.shown());
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// None when a signal ended it.
    pub fn exit_code(&mut self, limit: Duration) -> Option<i32> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the program is ours") {
                return status.code();
            }
            assert!(began.elapsed() < limit, "the program does not end; shown: {:?}", self.shown());
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
