//! What inotify says, as it says it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

/// Watch descriptor, mask, cookie and length of the name: four words (inotify(7)).
const HEAD_BYTES: usize = 16;

#[derive(Debug, PartialEq, Eq)]
pub struct Event {
    /// Of the directory; -1 when the queue was full.
    pub watch: i32,
    pub mask: u32,
    /// The same for both halves of a rename.
    pub cookie: u32,
    /// Empty: the directory itself.
    pub name: OsString,
    /// Bytes that it took in the queue.
    pub length: usize,
}

/// A read from an inotify descriptor holds whole events only.
pub fn events(mut bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some((head, rest)) = bytes.split_at_checked(HEAD_BYTES) {
        let word = |at: usize| head[at..at + 4].try_into().map(u32::from_ne_bytes).expect("four bytes");
        let padded = usize::try_from(word(12)).expect("a name is short");
        let Some((name, rest)) = rest.split_at_checked(padded) else { break };
        events.push(Event {
            watch: word(0).cast_signed(),
            mask: word(4),
            cookie: word(8),
            name: OsString::from_vec(name.iter().copied().take_while(|byte| *byte != 0).collect()),
            length: HEAD_BYTES + padded,
        });
        bytes = rest;
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_cut_apart() {
        let raw = |watch: i32, mask: u32, name: &[u8]| {
            let words = [watch.cast_unsigned(), mask, 7, u32::try_from(name.len()).unwrap()];
            [words.map(u32::to_ne_bytes).concat(), name.to_vec()].concat()
        };
        let bytes = [raw(1, 256, b"name\0\0\0\0"), raw(-1, 0x4000, b"")].concat();
        let expected = [
            Event { watch: 1, mask: 256, cookie: 7, name: "name".into(), length: 24 },
            Event { watch: -1, mask: 0x4000, cookie: 7, name: OsString::new(), length: 16 },
        ];
        assert_eq!(events(&bytes), expected);
        assert_eq!(events(&bytes[..30]).len(), 1);
        assert_eq!(events(&[]), []);
    }
}
