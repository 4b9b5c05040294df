//! Server-sent events, taken out of the bytes of a body as they come.

/// Of one line: an event bears a sandbox at most.
const LINE_MAX: usize = 1 << 20;

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Message {
    pub event: String,
    pub data: String,
    pub id: Option<String>,
}

#[derive(Debug, Default)]
pub struct Parser {
    /// The beginning of a line.
    rest: Vec<u8>,
    message: Message,
    has_data: bool,
}

/// A line has no end.
#[derive(Debug, PartialEq)]
pub struct TooLong;

impl Parser {
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Message>, TooLong> {
        let mut messages = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.rest.extend_from_slice(piece);
            if self.rest.len() > LINE_MAX {
                return Err(TooLong);
            }
            if self.rest.last() == Some(&b'\n') {
                let line = std::mem::take(&mut self.rest);
                messages.extend(self.line(String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n'])));
            }
        }
        Ok(messages)
    }

    fn line(&mut self, line: &str) -> Option<Message> {
        if line.is_empty() {
            let message = std::mem::take(&mut self.message);
            return std::mem::take(&mut self.has_data).then_some(message);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => self.message.event = value.to_owned(),
            "id" => self.message.id = Some(value.to_owned()),
            "data" => {
                if self.has_data {
                    self.message.data.push('\n');
                }
                self.message.data.push_str(value);
                self.has_data = true;
            }
            // Comments begin with the colon; others are of versions to come.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_whole_however_the_bytes_are_cut() {
        let text = b": keepalive\n\nevent: a\r\ndata: 1\ndata: 2\nid: 7\n\nretry: 3\ndata:x\n\nevent: unfinished\n";
        let said = |event: &str, data: &str, id: Option<&str>| Message {
            event: event.into(),
            data: data.into(),
            id: id.map(str::to_owned),
        };
        let wanted = [said("a", "1\n2", Some("7")), said("", "x", None)];
        for size in 1..=text.len() {
            let mut parser = Parser::default();
            let found: Vec<_> = text.chunks(size).flat_map(|piece| parser.feed(piece).unwrap()).collect();
            assert_eq!(found, wanted, "by {size}");
        }
        assert_eq!(Parser::default().feed(&vec![b'x'; LINE_MAX + 1]), Err(TooLong));
    }
}
