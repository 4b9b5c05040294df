//! A guest without a CPU: a thread that writes to memory, now and then to the serial line, and uses a little time.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::memory::{Memory, PAGE};
use crate::output::SerialLine;

const TICK: Duration = Duration::from_millis(2);
/// One line on the serial output in so many ticks: about one a second.
const TICKS_OF_A_LINE: u64 = 500;
const PAGES_OF_A_TICK: u32 = 4;
/// One page in so many is zeroed instead of filled: a snapshot that drops zeros where there was something is wrong.
const ZEROED: u64 = 4;
/// The page of the counter.
const COUNTER: u32 = 0;
/// Where the kernel goes: low, so that a guest of one mebibyte has room for it.
const KERNEL: u32 = 16;
const KERNEL_PAGES: usize = 64;
/// The pages that a running guest changes: 4 MiB after the kernel, less in a smaller guest.
const WORK: u32 = KERNEL + KERNEL_PAGES as u32;
const WORK_PAGES: u32 = 1024;

/// Dropped with its process alone: the thread ends with that.
pub struct Guest {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

pub struct State {
    pub memory: Memory,
    pub counter: u64,
    running: bool,
    serial: SerialLine,
}

impl Guest {
    /// With the first pages of the kernel's file in its memory; it runs at once.
    pub fn boot(mut memory: Memory, kernel: &[u8], mut serial: SerialLine) -> Self {
        for (page, content) in (KERNEL..memory.pages()).zip(kernel.chunks(PAGE).take(KERNEL_PAGES)) {
            memory.write(page)[..content.len()].copy_from_slice(content);
        }
        serial.write("Run /init as init process");
        Self::new(State { memory, counter: 0, running: true, serial })
    }

    /// Stands still until it is resumed.
    pub fn restore(memory: Memory, counter: u64, serial: SerialLine) -> Self {
        Self::new(State { memory, counter, running: false, serial })
    }

    fn new(state: State) -> Self {
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let of_thread = shared.clone();
        std::thread::spawn(move || {
            loop {
                let waiting = of_thread.changed.wait_while(of_thread.lock(), |state| !state.running);
                waiting.unwrap_or_else(PoisonError::into_inner).tick();
                std::thread::sleep(TICK);
            }
        });
        Self { shared }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }

    pub fn is_running(&self) -> bool {
        self.state().running
    }

    /// When it returns nothing writes to the memory any more.
    pub fn pause(&self) {
        self.state().running = false;
    }

    pub fn resume(&self) {
        self.state().running = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn tick(&mut self) {
        self.counter += 1;
        let counter = self.counter;
        self.memory.write(COUNTER)[..8].copy_from_slice(&counter.to_le_bytes());
        let room = self.memory.pages().saturating_sub(WORK).clamp(1, WORK_PAGES);
        let mut random = Random(counter);
        for _ in 0..PAGES_OF_A_TICK {
            let page = WORK + u32::try_from(random.next() % u64::from(room)).expect("less than the pages of the guest");
            let zeroed = random.next().is_multiple_of(ZEROED);
            for word in self.memory.write(page).chunks_mut(8) {
                let value = if zeroed { 0 } else { random.next() };
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
        if counter.is_multiple_of(TICKS_OF_A_LINE) {
            self.serial.write(&format!("simulated guest: tick {counter}"));
        }
    }
}

/// Splitmix64: the same counter always gives the same writes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
