//! The processes that envd has started, and no others: selectors reach nothing else.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::guest::process::ProcessConfig;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

use super::child::Child;
use super::input::Input;
use super::output::{Channel, Ended, Listener, Listeners, pump};
use crate::console::say;
use crate::freezer::Group;

/// How long a process that has ended can still be connected to.
const REMEMBERED: Duration = Duration::from_secs(30);
/// And how many of them; beyond it the oldest is forgotten, so that ten thousand fast commands do not pile up.
const REMEMBERED_MAX: usize = 512;

/// How often it is looked whether a process that has ended is let go by who traces it.
const TRACED_LOOK: Duration = Duration::from_millis(20);

pub struct Process {
    pub pid: u32,
    pub tag: Option<String>,
    pub stdin: Option<Input>,
    pub terminal: Option<Terminal>,
    /// Arguments and environment may be megabytes: a process that has ended has none.
    config: Mutex<Option<ProcessConfig>>,
    listeners: Arc<Listeners>,
    ended: watch::Sender<Option<Ended>>,
    group: Mutex<Option<Group>>,
}

impl Process {
    /// What is kept of its output from position `from` on, what comes, and its end.
    pub fn listen(&self, from: u64) -> Listener {
        self.listeners.listen(from)
    }

    /// `None` when it has ended.
    pub fn config(&self) -> Option<ProcessConfig> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Until it has ended.
    pub async fn wait(&self) {
        // Only fails when the sender is gone, and it is ours.
        let _ = self.ended.subscribe().wait_for(Option::is_some).await;
    }

    /// Whether it has been collected; some of its output may still be on its way.
    pub fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// To its whole process group; SIGKILL to its whole control group. A process that has ended gets nothing: its number may be another's.
    pub fn signal(&self, signal: libc::c_int) -> io::Result<()> {
        let group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        if self.has_ended() {
            return Ok(());
        }
        let pid = libc::pid_t::try_from(self.pid).map_err(io::Error::other)?;
        // SAFETY: the process has not been collected while `ended` is unset, so its number (and its group's, which is the same) is its own.
        let sent = unsafe { libc::kill(-pid, signal) };
        if signal == libc::SIGKILL
            && let Some(group) = group.as_ref()
        {
            group.kill()?;
        }
        if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// A terminal from the side that envd has.
pub struct Terminal {
    pub input: Input,
    /// To ask for another size; `None` when the process has ended, so that the terminal closes with it.
    master: Mutex<Option<OwnedFd>>,
}

impl Terminal {
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let master = self.master.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(master) = master.as_ref() else { return Ok(()) };
        // SAFETY: TIOCSWINSZ only reads a winsize.
        if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

pub struct Table {
    processes: Mutex<HashMap<u32, Arc<Process>>>,
    /// The oldest first. Forgotten when somebody looks, without a timer each.
    ended: Mutex<VecDeque<(Instant, Arc<Process>)>>,
    places: Arc<Semaphore>,
}

/// A process's place among those that may run at once.
pub struct Place(#[expect(dead_code, reason = "held, not looked at")] OwnedSemaphorePermit);

/// What `Table::adopt` is given beside the child.
pub struct Newborn {
    pub child: Child,
    pub config: ProcessConfig,
    pub tag: Option<String>,
    /// The terminal and another descriptor of it.
    pub pty: Option<(pty_process::Pty, OwnedFd)>,
    pub group: Option<Group>,
}

impl Table {
    pub fn new(processes_max: usize) -> Arc<Self> {
        let places = Arc::new(Semaphore::new(processes_max));
        Arc::new(Self { processes: Mutex::default(), ended: Mutex::default(), places })
    }

    /// `None` when as many processes run as may.
    pub fn place(&self) -> Option<Place> {
        self.places.clone().try_acquire_owned().ok().map(Place)
    }

    /// Takes care of a child to its end, and gives the first listener, which misses nothing.
    pub fn adopt(self: &Arc<Self>, newborn: Newborn, place: Place) -> (Arc<Process>, Listener) {
        let Newborn { mut child, config, tag, pty, group } = newborn;
        let pid = child.pid;
        let listeners = Arc::new(Listeners::default());
        let first = listeners.listen(0);
        let (ended, on_end) = watch::channel(None);
        let (exited, on_exit) = watch::channel(false);
        let mut pumps = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            pumps.push(tokio::spawn(pump(pipe, Channel::Stdout, listeners.clone(), on_exit.clone())));
        }
        if let Some(pipe) = child.stderr.take() {
            pumps.push(tokio::spawn(pump(pipe, Channel::Stderr, listeners.clone(), on_exit.clone())));
        }
        let terminal = pty.map(|(pty, master)| {
            let descriptor = pty.as_raw_fd();
            let (reader, writer) = pty.into_split();
            pumps.push(tokio::spawn(pump(Reader { reader, descriptor }, Channel::Pty, listeners.clone(), on_exit)));
            Terminal { input: Input::of(writer, on_end.clone()), master: Mutex::new(Some(master)) }
        });
        let process = Arc::new(Process {
            pid,
            tag,
            stdin: child.stdin.take().map(|stdin| Input::of(stdin, on_end)),
            terminal,
            config: Mutex::new(Some(config)),
            listeners,
            ended,
            group: Mutex::new(group),
        });
        self.lock().insert(pid, process.clone());
        let (table, watched) = (self.clone(), process.clone());
        tokio::spawn(async move {
            let (ended, group) = wait(&mut child, &watched).await;
            drop(place);
            exited.send_replace(true);
            for pump in pumps {
                // A pump ends by itself; one that panicked has nothing more to give.
                let _ = pump.await;
            }
            watched.listeners.end(ended);
            table.remember(watched);
            // Its listeners first: removing the group takes the kernel a moment.
            tokio::task::yield_now().await;
            drop(group);
        });
        (process, first)
    }

    pub fn by_pid(&self, pid: u32) -> Option<Arc<Process>> {
        self.forget();
        self.lock().get(&pid).cloned()
    }

    fn remember(&self, process: Arc<Process>) {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).push_back((Instant::now(), process));
        self.forget();
    }

    fn forget(&self) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        while ended.len() > REMEMBERED_MAX || ended.front().is_some_and(|(at, _)| at.elapsed() > REMEMBERED) {
            let Some((_, process)) = ended.pop_front() else { return };
            let mut processes = self.lock();
            // Its number may be another's by now.
            if processes.get(&process.pid).is_some_and(|it| Arc::ptr_eq(it, &process)) {
                processes.remove(&process.pid);
            }
        }
    }

    /// The running one of that tag, else the one that ended last.
    pub fn by_tag(&self, tag: &str) -> Option<Arc<Process>> {
        self.forget();
        let is_it = |process: &Arc<Process>| process.tag.as_deref() == Some(tag);
        let running = self.lock().values().find(|process| is_it(process) && !process.has_ended()).cloned();
        let last = || {
            let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
            ended.iter().rev().map(|(_, process)| process).find(|process| is_it(process)).cloned()
        };
        // One that has just ended, with its last output still on its way, is in the table alone.
        running.or_else(last).or_else(|| self.lock().values().find(|process| is_it(process)).cloned())
    }

    pub fn running(&self) -> Vec<Arc<Process>> {
        let mut running: Vec<_> = self.lock().values().filter(|process| !process.has_ended()).cloned().collect();
        running.sort_by_key(|process| process.pid);
        running
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Arc<Process>>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits, and collects it under the lock that signals take, so that no signal goes to a number that is free again. The group comes along.
async fn wait(child: &mut Child, process: &Process) -> (Ended, Option<Group>) {
    use std::os::unix::process::ExitStatusExt as _;
    let pid = process.pid;
    let waited = child.ended().await;
    let (mut held, status) = loop {
        let held = process.group.lock().unwrap_or_else(PoisonError::into_inner);
        match waited.as_ref().map_err(|e| io::Error::from(e.kind())).and_then(|()| child.collect()) {
            Ok(Some(status)) => break (held, Ok(status)),
            Err(e) => break (held, Err(e)),
            // Whoever traces it has to let it go first.
            Ok(None) => drop(held),
        }
        tokio::time::sleep(TRACED_LOOK).await;
    };
    let group = held.take();
    let ended = match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => Ended { code, signal: None },
            (None, signal) => Ended { code: -1, signal: Some(signal_name(signal.unwrap_or(0))) },
        },
        Err(e) => {
            say(format_args!("wait for {pid}: {e}"));
            Ended { code: -1, signal: Some("unknown") }
        }
    };
    process.ended.send_replace(Some(ended.clone()));
    drop(held);
    process.config.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(terminal) = &process.terminal {
        terminal.master.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
    (ended, group)
}

/// As Go's standard library says it, because published clients show that text.
fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGUSR1 => "user defined signal 1",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGUSR2 => "user defined signal 2",
        libc::SIGPIPE => "broken pipe",
        libc::SIGALRM => "alarm clock",
        libc::SIGTERM => "terminated",
        _ => "signal",
    }
}

/// A terminal's reading half, with the descriptor that the pump asks for what is left.
struct Reader {
    reader: pty_process::OwnedReadPty,
    /// Open as long as `reader` is.
    descriptor: std::os::fd::RawFd,
}

impl tokio::io::AsyncRead for Reader {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.reader).poll_read(context, buffer)
    }
}

impl std::os::fd::AsRawFd for Reader {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.descriptor
    }
}
