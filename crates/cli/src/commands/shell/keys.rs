//! Which keys are for the command line and not for the sandbox: `Ctrl-]`, and then one more.

/// `Ctrl-]`, which telnet has for the same purpose.
const ESCAPE: u8 = 0x1d;

pub const HELP: &str = "Ctrl-] and then: d detach (the shell goes on), k kill the shell, Ctrl-] send one, ? this help; any other key is sent with it";

#[derive(Debug, PartialEq)]
pub enum Typed {
    /// For the shell.
    Input(Vec<u8>),
    Detach,
    Kill,
    Help,
}

/// Knows whether the last key was `Ctrl-]`.
#[derive(Default)]
pub struct Keys {
    is_escaped: bool,
}

impl Keys {
    /// What was typed, in order. What comes after a detach is nobody's.
    pub fn read(&mut self, bytes: &[u8]) -> Vec<Typed> {
        let mut typed = Vec::new();
        let mut input = Vec::new();
        for &byte in bytes {
            if !std::mem::take(&mut self.is_escaped) {
                match byte {
                    ESCAPE => self.is_escaped = true,
                    byte => input.push(byte),
                }
                continue;
            }
            let command = match byte {
                b'd' | b'D' | b'.' => Typed::Detach,
                b'k' | b'K' => Typed::Kill,
                b'?' => Typed::Help,
                ESCAPE => {
                    input.push(ESCAPE);
                    continue;
                }
                byte => {
                    input.extend([ESCAPE, byte]);
                    continue;
                }
            };
            if !input.is_empty() {
                typed.push(Typed::Input(std::mem::take(&mut input)));
            }
            let is_last = command == Typed::Detach;
            typed.push(command);
            if is_last {
                return typed;
            }
        }
        if !input.is_empty() {
            typed.push(Typed::Input(input));
        }
        typed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(pieces: &[&[u8]]) -> Vec<Typed> {
        let mut keys = Keys::default();
        pieces.iter().flat_map(|piece| keys.read(piece)).collect()
    }

    #[test]
    fn two_keys_are_a_command_also_when_they_come_apart() {
        let input = |bytes: &[u8]| Typed::Input(bytes.to_vec());
        assert_eq!(typed(&[b"ls\r"]), [input(b"ls\r")]);
        assert_eq!(typed(&[b"a\x1ddb"]), [input(b"a"), Typed::Detach]);
        assert_eq!(typed(&[b"a\x1d", b"d"]), [input(b"a"), Typed::Detach]);
        assert_eq!(typed(&[b"\x1dk", b"\x1d?"]), [Typed::Kill, Typed::Help]);
        // Itself by two, and what is no command as it was typed.
        assert_eq!(typed(&[b"\x1d\x1d\x1dx"]), [input(b"\x1d\x1dx")]);
        assert_eq!(typed(&[b"\x1d"]), []);
    }
}
