//! What a step of a build wrote, as it is kept.

/// Of each stream, its end.
pub const BYTES_MAX: usize = 64 * 1024;

/// The end of an output that may be of any length.
#[derive(Debug, Default)]
pub struct Tail(Vec<u8>);

impl Tail {
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        // Now and then, so that many small pieces do not move all of it each.
        if self.0.len() > 2 * BYTES_MAX {
            self.0.drain(..self.0.len() - BYTES_MAX);
        }
    }

    /// What is no character, and NUL, which the database does not take, become U+FFFD.
    pub fn text(&self) -> String {
        let from = self.0.len().saturating_sub(BYTES_MAX);
        let bytes = &self.0[from..];
        // A cut may lie within a character.
        let within = if from > 0 { bytes.iter().take_while(|byte| **byte & 0xc0 == 0x80).count() } else { 0 };
        String::from_utf8_lossy(&bytes[within..]).replace('\0', "\u{fffd}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_kept() {
        let mut tail = Tail::default();
        for number in 0..100_000 {
            tail.add(format!("é{number}\n").as_bytes());
        }
        let text = tail.text();
        assert!(text.ends_with("é99999\n") && text.len() <= BYTES_MAX && text.len() > BYTES_MAX - 16);
        assert!(!text.contains('\u{fffd}'));
    }

    #[test]
    fn what_the_database_does_not_take_is_not_kept() {
        let mut tail = Tail::default();
        tail.add(b"a\0b\xff");
        assert_eq!(tail.text(), "a\u{fffd}b\u{fffd}");
    }
}
