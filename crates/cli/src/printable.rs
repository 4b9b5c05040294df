//! What a guest wrote, made harmless for a terminal: names, messages, consoles. A sandbox is not trusted, and what it calls its files must not
//! steer the terminal of whoever lists them.

/// One line that says exactly what there was: control characters, what turns the direction of text, and the backslash itself are written as
/// escapes.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => escaped.push_str("\\\\"),
            c if is_steering(c) => escaped.extend(c.escape_default()),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Several lines as they are, without what steers.
pub fn lines(text: &str) -> String {
    text.chars().filter(|c| !is_steering(*c) || matches!(c, '\n' | '\t')).collect()
}

fn is_steering(c: char) -> bool {
    // Controls (C0, DEL, C1), separators of lines, marks and overrides of the direction.
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_guest_writes_steers_the_terminal() {
        assert_eq!(escaped("a\x1b[2Jb\u{9b}1m\nc\\d\u{202e}e ü"), "a\\u{1b}[2Jb\\u{9b}1m\\nc\\\\d\\u{202e}e ü");
        assert_eq!(lines("a\r\n\x1b[2Jb\u{9b}1m\tc\n"), "a\n[2Jb1m\tc\n");
    }
}
