//! The terminal of whoever runs a command: its size, and its raw mode, in which every key goes to the sandbox. However the command ends, by a
//! panic too, the terminal is again as it was.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, Once, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::failure::{Doing as _, Failure};

/// What a program of the sandbox may have left on, taken back: hidden cursor, reports of the mouse and of the focus, bracketed paste,
/// application keys, colours.
const PLAIN: &str = "\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1004l\x1b[?2004l\x1b[?1l\x1b>\x1b[0m";

/// What full-screen programs begin and end with: another screen, beside the one with the lines before.
const OTHER_SCREEN: &[u8] = b"\x1b[?1049h";
const OWN_SCREEN: &[u8] = b"\x1b[?1049l";

/// How the terminal was before it became raw. Outside of the guard, because a panic restores it too.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// The terminal is raw as long as this lives.
pub struct Raw(());

impl Raw {
    /// None where standard input is no terminal.
    pub fn enter() -> Result<Option<Self>, Failure> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin).doing(|| "ask the terminal how it is set".to_owned())?;
        let mut raw = before.clone();
        raw.make_raw();
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                next(panic);
            }));
        });
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let guard = Self(());
        // Now, and not when all is written: an output that was stopped would hold it up.
        tcsetattr(&stdin, OptionalActions::Now, &raw).doing(|| "make the terminal raw".to_owned())?;
        Ok(Some(guard))
    }

    /// Takes back what a program in the sandbox that goes on may have left on.
    pub fn make_plain(&self, screen: &Screen) {
        let mut out = std::io::stdout();
        if out.is_terminal() {
            // Said on the own screen, it would move the cursor.
            let back = if screen.is_other { OWN_SCREEN } else { b"" };
            let _ = out.write_all(back).and_then(|()| out.write_all(PLAIN.as_bytes())).and_then(|()| out.flush());
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// On which screen the terminal is, by what was shown on it.
#[derive(Debug, Default)]
pub struct Screen {
    is_other: bool,
    /// The last few bytes: a word may come in two pieces.
    tail: Vec<u8>,
}

impl Screen {
    pub fn shown(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        let last = self.tail.windows(OTHER_SCREEN.len()).rev().find(|word| [OTHER_SCREEN, OWN_SCREEN].contains(word));
        if let Some(word) = last {
            self.is_other = word == OTHER_SCREEN;
        }
        let kept = self.tail.len().saturating_sub(OTHER_SCREEN.len() - 1);
        self.tail.drain(..kept);
    }
}

fn restore() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // There is nobody to tell when the terminal is gone.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &before);
    }
}

/// Columns and rows, of whichever of the three standard files is a terminal; one that does not say is as a terminal was a long time ago.
pub fn size() -> (u16, u16) {
    let sizes = [tcgetwinsize(std::io::stdin()), tcgetwinsize(std::io::stdout()), tcgetwinsize(std::io::stderr())];
    let said = sizes.into_iter().flatten().find(|size| size.ws_col > 0 && size.ws_row > 0);
    said.map_or((80, 24), |size| (size.ws_col, size.ws_row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_screen_is_known_however_it_is_told() {
        let mut screen = Screen::default();
        for (bytes, is_other) in [
            ("text\x1b[?10", false),
            ("49h more", true),
            ("", true),
            ("\x1b[?1049l", false),
            ("\x1b[?1049h\x1b[?1049l", false),
            ("\x1b[?1049l\x1b[?1049h", true),
        ] {
            screen.shown(bytes.as_bytes());
            assert_eq!(screen.is_other, is_other, "{bytes:?}");
        }
    }
}
